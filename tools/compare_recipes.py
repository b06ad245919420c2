"""Train the digits recipe in several variants and seeds, and print what each came to as a Markdown table.

python tools/compare_recipes.py base= "nested=dydit.nested=true" --out runs/compare --seeds 0 1

A variant is its name, =, and settings as on the command line of ``dydit finetune``, separated by spaces. A
finished run adds one line to OUT/runs.jsonl; those that are there are not repeated. One that was interrupted
goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dydit.compute.analytic import executed_macs
from dydit.config import RunConfig, load_config
from dydit.costs import static_macs
from dydit.diffusion import make_sampler
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.evaluation.digit_classifier import load_digit_split, train_digit_classifier
from dydit.evaluation.digit_quality import digit_quality
from dydit.export.schedule import SubnetSchedule
from dydit.files import write_file
from dydit.models.loading import load_backbone
from dydit.quickstart.measure import QUALITY_BATCH, QUALITY_SAMPLES, Subject
from dydit.runtime.engine import SubnetEngine
from dydit.training import make_dataset, train
from dydit.training.folder import CONFIG_FILE

# Column -> (field of a run's record, how it is written).
COLUMNS = {
    "compute in training": ("ratio_train", "{:.3f}"),
    "evaluated": ("ratio_eval", "{:.3f}"),
    "deployed": ("ratio_deployed", "{:.3f}"),
    "Fréchet distance": ("frechet", "{:.2f}"),
    "class accuracy": ("accuracy", "{:.1%}"),
    "share of views": ("view_share", "{:.0%}"),
    "distinct subnetworks": ("subnetworks", "{:.0f}"),
}


def run_variant(cfg: RunConfig) -> dict[str, float]:
    """Fine-tune, export, sample with the engine and measure, as ``dydit quickstart`` does."""
    backbone = load_backbone(str(cfg.backbone))
    torch.manual_seed(cfg.seed)
    model = convert(backbone, cfg.dydit)
    trained = train(model, cfg, make_dataset(cfg.data), frozen_backbone=backbone, resume="auto")
    if trained.stopped:
        raise SystemExit("stopped; the same command goes on")
    for network in (model, backbone):  # all else is done on the CPU
        network.to("cpu")
    sampler = make_sampler(cfg.sampler, backbone.shape.learn_sigma)
    schedule = SubnetSchedule.from_model(model, sampler.timesteps, cfg.sampler.model_dump(mode="json"))
    subject = Subject(backbone, model, SubnetEngine(model, schedule), sampler, cfg.seed)
    return {
        "ratio_train": trained.metrics["ratio"],
        "ratio_eval": trained.metrics["ratio_eval"],
        "ratio_deployed": deployed_ratio(subject, model),
        **quality(subject),
        "view_share": schedule.view_share,
        "subnetworks": len(schedule.head_rows),
    }


def deployed_ratio(subject: Subject, model: DyDiT) -> float:
    """Executed over static MACs, mean over a sampling run."""
    executed = [executed_macs(model.shape, model.routing_config, r).double().mean() for r in subject.routings]
    return float(torch.stack(executed).mean()) / static_macs(model.shape)


def quality(subject: Subject) -> dict[str, float]:
    """Fréchet distance and class accuracy of the engine's samples."""
    split = load_digit_split()
    noise, labels = subject.inputs(QUALITY_SAMPLES)
    parts = zip(noise.split(QUALITY_BATCH), labels.split(QUALITY_BATCH), strict=True)
    null = subject.model.null_label
    images = torch.cat([subject.sampler.sample(subject.engine, n, y, null) for n, y in parts])
    found = digit_quality(train_digit_classifier(split), split, images, labels)
    return {"frechet": found.frechet, "accuracy": found.class_accuracy}


def table(records: Sequence[dict[str, Any]]) -> str:
    """One row per variant: means over its seeds, and in brackets the values that they were made of."""
    names = list(dict.fromkeys(record["variant"] for record in records))
    rows = [["variant", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for name in names:
        runs = [record for record in records if record["variant"] == name]
        rows.append([name, *(_cell([run[key] for run in runs], text) for key, text in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: Sequence[float], text: str) -> str:
    each = [text.format(value) for value in values]
    mean = text.format(sum(values) / len(values))
    return mean if len(set(each)) == 1 else f"{mean} ({', '.join(each)})"


def check_settings(cfg: RunConfig) -> None:
    """Refuse a folder with a run of other settings: going on, or finished, it would pass for this one."""
    file = Path(cfg.output_dir) / CONFIG_FILE
    if file.exists() and load_config(file) != cfg:
        raise SystemExit(f"{file} has other settings; give the variant another name, or set another --out")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("variants", nargs="+", metavar="NAME=SETTINGS")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    wanted = [variant.partition("=")[::2] for variant in options.variants]
    for seed in options.seeds:
        for name, settings in wanted:
            folder = options.out / f"{name.replace(' ', '-')}-{seed}"
            cfg = load_config(
                options.config, [*shlex.split(settings), f"seed={seed}", f"output_dir={folder}"]
            )
            check_settings(cfg)
            if any((run["variant"], run["settings"], run["seed"]) == (name, settings, seed) for run in done):
                continue
            done.append({"variant": name, "settings": settings, "seed": seed, **run_variant(cfg)})
            write_file(path, "".join(json.dumps(run) + "\n" for run in done))
    print(table([run for run in done if (run["variant"], run["settings"]) in wanted]))


if __name__ == "__main__":
    main()
