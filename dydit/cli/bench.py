"""``dydit bench``: what the deployed engine saves on the clock, beside what it saves in MACs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dydit.cli.execution import check_compiler
from dydit.cli.sampler_options import Sampler, Texts
from dydit.cli.sizes import parse_bytes
from dydit.errors import ConfigError

if TYPE_CHECKING:
    from dydit.benchmark.results import Benchmark


class Sweep(str, Enum):
    """What grows from case to case."""

    batch = "batch"
    tokens = "tokens"
    depth = "depth"


class Device(str, Enum):
    """Where to measure."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_PRESET",
            help="A DyDiT: its folder or file, or a run's folder; or a preset such as DiT-XL/2.",
        ),
    ],
    ratio: Annotated[
        float | None,
        typer.Option(help="Deployed compute of a preset, as a share of the static one.", show_default="0.5"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Images per call.")] = "2,8",
    dtype: Annotated[str, typer.Option(metavar="fp32,bf16,fp16", help="Number formats.")] = "fp32,bf16",
    mode: Annotated[
        str, typer.Option(metavar="exact,capacity", help="How the engine chooses tokens.")
    ] = "exact,capacity",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile every network with torch.compile.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each network.")] = 20,
    whole_run: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Also time whole sampling runs.", show_default=False),
    ] = None,
    whole_rounds: Annotated[int, typer.Option(min=1, help="Timed sampling runs of each network.")] = 1,
    sweep: Annotated[
        Sweep | None,
        typer.Option(
            help="Measure against batch size (1 to 16 in place of --batch), tokens or depth, with the models "
            "of a dtype in memory together; without masked model and memory.",
            show_default=False,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Packed weights the engine may keep, such as 1.5GB; without it one more copy of the blocks.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="Export folder of the model.", show_default=False)
    ] = None,
    texts: Texts = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of a preset.", show_default=False)] = None,
    sample_size: Annotated[
        int | None, typer.Option(min=1, help="Latent side of a preset.", show_default="32")
    ] = None,
    sampler: Sampler = None,
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance",
            help="Both halves of guidance in a call; without it as the sampler says.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, in processes of their own.")
    ] = True,
    device: Annotated[Device, typer.Option(help="auto: the GPU if there is one.")] = Device.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = Path("bench"),
) -> None:
    """Time the static backbone, the masked model and the engine in turns, and compare with the MACs.

    A preset gets random weights, and routers that deploy the asked share of its compute."""
    from dydit.benchmark.settings import BenchSettings, Dtype, ModeName

    given: dict[str, Any] = {
        "batches": _numbers("--batch", batch), "dtypes": _words("--dtype", dtype, Dtype),
        "modes": _words("--mode", mode, ModeName),
        "compile": compiled, "rounds": rounds, "whole_run": whole_run, "whole_rounds": whole_rounds,
        "sweep": None if sweep is None else sweep.value, "memory": memory,
        "memory_budget": parse_bytes("--memory-budget", memory_budget),
        "schedule": None if schedule is None else str(schedule),
        "texts": None if texts is None else str(texts), "depth": depth, "sample_size": sample_size,
        "sampler": None if sampler is None else sampler.value, "guidance": guidance, "threads": threads,
        "seed": seed,
    }  # fmt: skip
    from dydit.benchmark.run import run_benchmark
    from dydit.cli.mac_networks import is_preset
    from dydit.cli.models import model_path, sampler_defaults

    if is_preset(model):
        given |= {} if ratio is None else {"ratio": ratio}
    else:
        _check_no_ratio(model, ratio)
        given["path"] = model_path(model)
        if schedule is None:
            given["sampler_defaults"] = sampler_defaults(model)
    settings = BenchSettings(subject=model, **given, device=_device(device))
    if compiled:
        check_compiler("--compile", settings.device)
    typer.echo(_told(run_benchmark(settings, out), out))


def _told(found: Benchmark, out: Path) -> str:
    """The tables for the terminal."""
    from dydit.benchmark.page import conditions
    from dydit.benchmark.tables import calls_table, runs_table
    from dydit.report.table import align

    tables = [table for table in (calls_table(found), runs_table(found)) if table.rows]
    return "\n\n".join(
        [conditions(found), *(align(table.header, table.rows) for table in tables), f"wrote {out}"]
    )


def _check_no_ratio(model: str, ratio: float | None) -> None:
    """Refuse an option that would do nothing.

    Raises:
        ConfigError: a ratio for a model, which has routers of its own.
    """
    if ratio is not None:
        raise ConfigError(
            f"--ratio {ratio:g} for {model}",
            expected="a preset; a model deploys what its routers choose",
            remedy="leave --ratio out",
        )


def _device(device: Device) -> Literal["cpu", "cuda"]:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda without a GPU that torch can use", expected="a GPU, or --device cpu")
    return "cpu" if device is Device.cpu or not torch.cuda.is_available() else "cuda"


def _words(option: str, text: str, known: Any) -> tuple[str, ...]:
    """Words of a Literal with commas between."""
    words = tuple(word.strip() for word in text.split(","))
    if not set(words) <= {*get_args(known)}:
        raise ConfigError(f"{option} is {text!r}", expected=f"{', '.join(get_args(known))} or some of these")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(
            f"{option} is {text!r}", expected="whole numbers from 1 up with commas between, such as 2,8"
        )
    return numbers
