"""``dydit export``: one static subnetwork per sampling timestep, on disk."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit.cli.execution import DtypeChoice, check_aot_compiler, check_together
from dydit.cli.sampler_options import (
    LARGEST_SEED,
    GuidanceScale,
    GuidedChannels,
    Sampler,
    Steps,
    Texts,
    sampler_settings,
)
from dydit.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from dydit.config import SamplerConfig
    from dydit.dynamic.dydit import DyDiT
    from dydit.export.calibration import Calibration
    from dydit.export.schedule import SubnetSchedule


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A DyDiT: its folder or file, or a run's folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an export that is there is replaced.")],
    sampler: Sampler = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guided_channels: GuidedChannels = None,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Put the weights beside the schedule.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Move the thresholds until the mean compute is the target.")
    ] = False,
    target: Annotated[
        float | None,
        typer.Option(help="Compute ratio for --calibrate; without it the run's own.", show_default=False),
    ] = None,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Also choose a fixed number of tokens per timestep and block.")
    ] = False,
    capacity_multiple: Annotated[
        int | None,
        typer.Option(min=1, help="Round these numbers to multiples of this.", show_default="1"),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Trajectories of the calibration set.", show_default="8")
    ] = None,
    calibration_seed: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of the calibration set.", show_default="0"),
    ] = None,
    texts: Texts = None,
    order: Annotated[
        bool,
        typer.Option("--order", help="Order heads and groups by use, so that most slices need no copy."),
    ] = False,
    aot: Annotated[
        bool,
        typer.Option("--aot", help="Write programs and weights beside it that run with torch alone."),
    ] = False,
    aot_dtype: Annotated[
        DtypeChoice | None,
        typer.Option(help="Precision of these; without it the model's.", show_default=False),
    ] = None,
    aot_compile: Annotated[
        bool | None,
        typer.Option(
            "--aot-compile/--no-aot-compile",
            help="Also compile them by AOTInductor, for this machine; default: if there is a C++ compiler.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a subnetwork for each sampling timestep."""
    _check_replaceable(out)
    if not (with_weights or order):
        _check_kept(model, out)
    check_together(
        ("--target", target, "--calibrate", calibrate),
        ("--capacity-multiple", capacity_multiple, "--capacity", capacity),
        ("--calibration-samples", calibration_samples, "--calibrate or --capacity", calibrate or capacity),
        ("--calibration-seed", calibration_seed, "--calibrate or --capacity", calibrate or capacity),
        ("--texts", texts, "--calibrate or --capacity", calibrate or capacity),
    )
    _check_aot(aot, aot_dtype, aot_compile)
    from dydit.cli.models import open_dydit, sampler_defaults, trained_target
    from dydit.export.texts import read_texts
    from dydit.files import check_writable, new_folder

    goal = _target(target, trained_target(model)) if calibrate else None
    settings = sampler_settings(sampler_defaults(model), sampler, steps, guidance_scale, guided_channels)
    encoded = read_texts(texts) if texts else None
    network = open_dydit(model)
    found = None
    if calibrate or capacity:
        check_writable(out.resolve().parent)  # before minutes of passes
        multiple = (capacity_multiple or 1) if capacity else None
        samples, seed = calibration_samples or 8, calibration_seed or 0
        found = _calibrate(network, settings, goal, samples, seed, multiple, encoded)
    schedule, views_before = _read_off(network, settings, found, order)
    with new_folder(out) as folder:
        if saved := with_weights or order:
            network.save_pretrained(folder)
        if aot:
            deployed = [_deploy(folder, network, schedule, saved, aot_dtype, aot_compile)]
        else:
            schedule.save(str(folder))
            deployed = []
    typer.echo("\n".join([*_story(out, schedule, found, views_before), *deployed]))


def _deploy(
    folder: Path,
    network: DyDiT,
    schedule: SubnetSchedule,
    saved: bool,
    dtype: DtypeChoice | None,
    compile: bool | None,
) -> str:
    """Write the programs, and the weights where no model was ``saved``; say what was written."""
    import torch

    from dydit.deployment.folder import (
        bytes_of,
        compile_programs,
        compiles_for,
        weight_bytes,
        write_deployment,
    )
    from dydit.models.checkpoints.sources import WEIGHTS
    from dydit.precision import DTYPES

    given = weight_bytes(network)
    shared = sorted(path.name for path in folder.glob(f"{WEIGHTS}*.safetensors")) if saved else ()
    wanted_dtype = None if dtype is None else DTYPES[dtype.value]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(network, device, wanted_dtype)
    programs = write_deployment(folder, network, schedule, shared)
    wanted = compiles_for(device) if compile is None else compile
    if wanted:
        compile_programs(folder, programs, progress=True)
    return (
        f"deployment: {len(programs.programs)} programs{', compiled too' if wanted else ''}; "
        f"the folder is {bytes_of(folder) / given:.2f} times the weights"
    )


def _calibrate(
    network: DyDiT,
    settings: SamplerConfig,
    target: float | None,
    samples: int,
    seed: int,
    capacity_multiple: int | None,
    texts: Tensor | None,
) -> Calibration:
    """See ``dydit.export.calibration.calibrate``; on the GPU if there is one."""
    import torch

    from dydit.diffusion import make_sampler
    from dydit.export.calibration import calibrate

    network.to("cuda" if torch.cuda.is_available() else "cpu")
    method = make_sampler(settings, network.shape.learn_sigma)
    return calibrate(
        network, method, target, samples, seed,
        capacity_multiple=capacity_multiple, progress=True, texts=texts,
    )  # fmt: skip


def _read_off(
    network: DyDiT, settings: SamplerConfig, found: Calibration | None, order: bool
) -> tuple[SubnetSchedule, float | None]:
    """The schedule and, where the network was put in order for it, the share of views before."""
    from dydit.diffusion import make_sampler
    from dydit.export.ordering import order_by_use
    from dydit.export.schedule import SubnetSchedule

    timesteps = make_sampler(settings, network.shape.learn_sigma).timesteps
    capacities, search = (found.capacities, found.to_json()) if found else (None, None)

    def read_off(weights: str | None = None) -> SubnetSchedule:
        sampler = settings.model_dump()
        return SubnetSchedule.from_model(network, timesteps, sampler, capacities, search, weights)

    if not order:
        return read_off(), None
    unordered = read_off(weights="")  # no sha256 of weights that are about to move
    order_by_use(network, unordered)
    return read_off(), unordered.view_share


def _story(
    out: Path, schedule: SubnetSchedule, found: Calibration | None, views_before: float | None
) -> list[str]:
    """What was written, one line for each step."""
    name, count = schedule.sampler["name"], len(schedule.timesteps)
    widths = schedule.heads.mean(), schedule.groups.mean()
    lines = [
        f"{out}: {name}, {count} timesteps; {widths[0]:.1%} of heads and {widths[1]:.1%} of MLP groups are on"
    ]
    if found and found.target is not None:
        lines.append(
            f"calibrated: compute ratio {found.ratio_before:.4f} -> {found.ratio_after:.4f} "
            f"(target {found.target:g}), threshold of width {_score(found.before.width)} -> "
            f"{_score(found.after.width)}, of tokens {_score(found.before.tokens)} -> "
            f"{_score(found.after.tokens)}; "
            f"{found.passes} pass{'' if found.passes == 1 else 'es'} over {found.samples} samples"
        )
    if found and found.chosen is not None:
        chosen = found.chosen
        lines.append(
            f"capacity: compute ratio {chosen.ratio:.4f}, exact mode {found.ratio_after:.4f}; relative "
            f"difference to it {chosen.call_difference:.3g} per call, {chosen.sample_difference:.3g} in "
            "samples"
        )
    if views_before is not None:
        lines.append(
            f"ordered: {views_before:.1%} -> {schedule.view_share:.1%} of slices are views of the weights"
        )
    return lines


def _score(threshold: float) -> str:
    """A threshold as text, also where it is next to 1."""
    return f"{threshold:.4g}" if threshold < 0.9995 else f"1 - {1 - threshold:.2g}"


def _target(given: float | None, trained: float | None) -> float:
    """The compute ratio to calibrate to.

    Raises:
        ConfigError: nobody says.
    """
    target = trained if given is None else given
    if target is None:
        raise ConfigError(
            "--calibrate for a model that is no run's folder",
            expected="a compute ratio, which a run's configuration would tell",
            remedy="add --target",
        )
    return target


def _check_aot(aot: bool, dtype: DtypeChoice | None, compile: bool | None) -> None:
    """Refuse an option of programs that are not to be written, and to compile without a compiler.

    Raises:
        ConfigError: says what to add or leave out.
    """
    check_together(("--aot-dtype", dtype, "--aot", aot), ("--aot-compile", compile, "--aot", aot))
    if compile:
        check_aot_compiler("--aot-compile")


def _check_kept(model: str, out: Path) -> None:
    """Refuse to put a schedule alone in the place of the weights that it is made from.

    Raises:
        OutputError: the model lies in ``out``.
    """
    given = Path(model).resolve()
    if given.exists() and out.exists() and out.resolve() in (given, *given.parents):
        raise OutputError(
            f"{out} holds the model, which the export would replace",
            expected="another folder",
            remedy="choose another --out, or add --with-weights",
        )


def _check_replaceable(out: Path) -> None:
    """Refuse a folder with something else in it: an export takes the place of the whole folder.

    Raises:
        OutputError: it is a file, cannot be replaced, or holds something that no export put there.
    """
    from dydit.files import check_replaceable

    check_replaceable(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    from dydit.deployment.folder import LOADER, PLAN, PROGRAMS, SUMS, WEIGHTS
    from dydit.export.artefact import MANIFEST, TENSORS, is_artefact
    from dydit.models.checkpoints.sources import WEIGHTS as MODEL

    # What an export writes, or wrote before there were sums; and Python beside the loader.
    written = (TENSORS, MANIFEST, "config.json", f"{MODEL}*", PROGRAMS, WEIGHTS, PLAN, SUMS, LOADER,
               "deployment.sha256", "__pycache__")  # fmt: skip
    names = sorted(path.name for path in out.iterdir())
    other = [name for name in names if not any(fnmatch(name, pattern) for pattern in written)]
    if other or not is_artefact(out):
        raise OutputError(
            f"{out} holds other files, such as {(other or names)[0]}",
            expected="a new folder or an export",
            remedy="choose another --out",
        )
