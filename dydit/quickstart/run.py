"""The steps of ``dydit quickstart``, each a call into the library."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

import dydit
from dydit.compute.machine import processor_name
from dydit.config import DyDiTConfig, RunConfig, find_path, load_config
from dydit.diffusion import make_sampler
from dydit.dynamic.compute_loss import minimum_ratio
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.errors import OutputError
from dydit.evaluation.calls import Call, largest_difference
from dydit.export.schedule import SubnetSchedule
from dydit.files import check_writable
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone
from dydit.quickstart import measure
from dydit.report.html import render_report
from dydit.report.storage import write_summary
from dydit.report.summary import Conditions, CurvePoint, EquivalenceCheck, Summary, SummaryArrays
from dydit.report.table import format_table
from dydit.runtime.engine import SubnetEngine
from dydit.training import make_dataset, train
from dydit.training.checks import check_target
from dydit.training.rng import scoped_rng

CONFIG = "configs/digits.yaml"
DEFAULT_OUT = "quickstart"
CONVERSION_TOLERANCE = 1e-6


def run_quickstart(
    steps: int | None = None,
    ratio: float | None = None,
    out: str | None = None,
    seed: int | None = None,
    control: bool = False,
) -> Summary:
    """Convert, fine-tune, export, sample, count, time and report the shipped digits backbone.

    Args:
        steps: optimiser steps of fine-tuning; None = the recipe's.
        ratio: target compute ratio λ in (0, 1]; None = the recipe's.
        out: folder for everything that is made; None = ``quickstart``.
        seed: of training and noise; None = the recipe's.
        control: also fine-tune the static backbone for as many steps and measure its quality: without it
            a gain in quality cannot be told from more training.

    Raises:
        DyditError: a setting out of range, a missing backbone, or a folder that cannot be written.
    """
    start, folder = time.perf_counter(), Path(out or DEFAULT_OUT)
    cfg = recipe(steps, ratio, seed, folder)
    check_new(cfg.output_dir, *([control_folder(cfg)] if control else []))
    backbone = load_backbone(find_path(str(cfg.backbone)))
    with scoped_rng():
        torch.manual_seed(cfg.seed)  # the token routers start at random
        model = convert(backbone, cfg.dydit)
    check_target(model, cfg)
    check_writable(folder)
    _say(f"1/6 converted {cfg.backbone}; checking that nothing changed")
    conversion = conversion_check(model, backbone, cfg.seed)
    _say(f"2/6 fine-tuning {cfg.train.steps} steps to {cfg.compute.target:g} of the compute "
         f"(lowest reachable: {minimum_ratio(model.shape, model.routing_config):.2f})")  # fmt: skip
    curve = finetune(model, backbone, cfg)
    _say("3/6 exporting one subnetwork per timestep")
    sampler = make_sampler(cfg.sampler, backbone.shape.learn_sigma)
    schedule = SubnetSchedule.from_model(model, sampler.timesteps, cfg.sampler.model_dump(mode="json"))
    schedule.save(str(folder / "export"))
    subject = measure.Subject(backbone, model, SubnetEngine(model, schedule), sampler, cfg.seed)
    _say("4/6 sampling with the backbone and with the engine, same noise")
    quality, samples = measure.quality_of(subject, finetuned_control(backbone, cfg) if control else None)
    _say("5/6 counting what was executed, and timing both in turn")
    compute = measure.compute_of(subject)
    checks = (conversion, *measure.checks_of(subject, compute))
    timing = measure.time_of(subject)
    _say("6/6 writing the report")
    summary = Summary(
        title="dydit quickstart: handwritten digits",
        conditions=conditions(cfg, backbone, control),
        compute=compute,
        time=timing,
        quality=quality,
        checks=checks,
        training=curve,
        arrays=SummaryArrays(**measure.schedule_arrays(subject), **samples),
    )
    write_summary(summary, folder)
    page = render_report(folder)
    print(f"\n{format_table(summary)}\n\nreport: {page} ({time.perf_counter() - start:.0f} s in all)")
    return summary


def recipe(steps: int | None, ratio: float | None, seed: int | None, folder: Path) -> RunConfig:
    """The digits recipe with the command line's changes.

    Raises:
        ConfigError: a value out of range.
    """
    changes = {"train.steps": steps, "compute.target": ratio, "seed": seed}
    given = [f"{key}={value}" for key, value in changes.items() if value is not None]
    cfg = load_config(find_path(CONFIG), given)
    return cfg.model_copy(update={"output_dir": str(folder / "run")})


def control_folder(cfg: RunConfig) -> str:
    """Where the static backbone is fine-tuned."""
    return f"{cfg.output_dir}-control"


def check_new(*folders: str) -> None:
    """Refuse, before the work, to train where a run was trained.

    Raises:
        OutputError: there is something in one of the folders.
    """
    for folder in map(Path, folders):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                f"{folder} holds a run already", remedy="choose another --out, or delete what is there"
            )


def conversion_check(model: DyDiT, backbone: DiT, seed: int) -> EquivalenceCheck:
    """Before training the converted model must compute what the backbone does."""
    shape, generator = backbone.shape, torch.Generator().manual_seed(seed)
    x = torch.randn(16, shape.in_channels, *shape.sample_size, generator=generator)
    y = torch.arange(16) % (shape.num_classes + 1)
    calls = [Call(x, t, y) for t in (0, 250, 500, 750, 999)]
    return EquivalenceCheck(
        name="converted model and backbone, before training",
        max_relative_difference=largest_difference(model.eval(), backbone, calls),
        tolerance=CONVERSION_TOLERANCE,
    )


def finetune(model: DyDiT, backbone: DiT, cfg: RunConfig) -> tuple[CurvePoint, ...]:
    """Train in place, as ``dydit finetune`` does; gives the logged curve."""
    curve: list[CurvePoint] = []

    def keep(step: int, record: object) -> None:
        if isinstance(record, dict):
            curve.append(_curve_point(step, record))

    _train_to_the_end(model, cfg, frozen_backbone=backbone, on_step=keep)
    return tuple(curve)


def finetuned_control(backbone: DiT, cfg: RunConfig) -> DyDiT:
    """The static backbone fine-tuned for as many steps by the same loop: a conversion without routers."""
    static = DyDiTConfig(head_routing=False, mlp_routing=False, token_routing=False, rank="none")
    changes = {
        "dydit": static,
        "compute": cfg.compute.model_copy(update={"target": 1.0}),
        "warmup": cfg.warmup.model_copy(update={"mode": "none"}),
        "output_dir": control_folder(cfg),
    }
    model = convert(backbone, static)
    _train_to_the_end(model, cfg.model_copy(update=changes))
    return model


def _train_to_the_end(model: DyDiT, cfg: RunConfig, **more: Any) -> None:
    """Train, and bring the model back to the CPU, where everything else is done.

    Raises:
        KeyboardInterrupt: asked to stop, the run has; half of a training is no result.
    """
    result = train(model, cfg, make_dataset(cfg.data), **more)
    if result.stopped:
        raise KeyboardInterrupt
    model.to("cpu")


def conditions(cfg: RunConfig, backbone: DiT, control: bool) -> Conditions:
    """Under which the figures of the summary were obtained."""
    shape = backbone.shape
    settings = {"steps": cfg.train.steps, "ratio": cfg.compute.target, "seed": cfg.seed}
    command = [f"--{name}={value}" for name, value in settings.items()]
    return Conditions(
        model=f"DiT, {shape.depth} blocks, {shape.hidden_size} wide, {shape.num_heads} heads, "
        f"{shape.tokens} tokens",
        dataset="scikit-learn handwritten digits (1,797 images, 8 × 8)",
        target_ratio=cfg.compute.target,
        training_steps=cfg.train.steps,
        seed=cfg.seed,
        sampler=cfg.sampler.name,
        sampling_steps=cfg.sampler.steps,
        guidance_scale=cfg.sampler.guidance_scale,
        batch_size=measure.BATCH,
        threads=torch.get_num_threads(),
        processor=processor_name(),
        torch_version=torch.__version__,
        dydit_version=dydit.__version__,
        command=shlex.join(["dydit", "quickstart", *command, *(["--control"] if control else [])]),
    )


def _curve_point(step: int, record: dict[str, float]) -> CurvePoint:
    return CurvePoint(
        step=step,
        loss=record.get("loss_diffusion"),
        ratio_train=record.get("ratio"),
        ratio_eval=record.get("ratio_eval"),
        target=record.get("ratio_target"),
    )


def _say(text: str) -> None:
    print(text, flush=True)
