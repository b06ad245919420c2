"""The launches of docs/training.md run as they are written there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = "ACCELERATE_USE_CPU=true accelerate launch"
TIMEOUT_S = 300
# In .ci/run two processes are those of test_training_distributed.py.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def launches() -> list[str]:
    """Command lines of the documentation that start processes on CPUs."""
    lines = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(LAUNCHER)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_on_cpus_train_as_one(tmp_path: Path, kind: str) -> None:
    (command,) = (line for line in launches() if f"{kind}.yaml" in line)
    both = f"train.steps=2 train.log_every=1 data.batch_size=4 output_dir={tmp_path / kind}"
    alone = f"train.steps=2 train.log_every=1 data.batch_size=8 output_dir={tmp_path / 'one'}"
    run(f"{command} {both}")
    run(f"dydit finetune configs/digits_smoke.yaml {alone}")
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in (kind, "one")
    ]
    assert len(records[0]) == 2 and (tmp_path / kind / "model").is_dir()
    for two, one in zip(*records, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def run(command: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
