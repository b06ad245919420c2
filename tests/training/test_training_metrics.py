"""metrics.jsonl and the sums behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dydit.errors import OutputError
from dydit.training.metrics import MetricsFile, Window, one_line


class OneProcess:
    """The part of an Accelerator that a window uses."""

    def reduce(self, tensor: torch.Tensor, _reduction: str) -> torch.Tensor:
        return tensor


def test_a_window_averages_each_value_over_the_steps_that_had_it() -> None:
    window = Window()
    window.add({"loss": torch.tensor(1.0), "loss_complete": torch.tensor(5.0)})
    window.add({"loss": torch.tensor(2.0)})
    assert window.means(OneProcess()) == {"loss": 1.5, "loss_complete": 5.0}
    window.clear()
    assert window.means(OneProcess()) == {}


def test_a_window_survives_json() -> None:
    window, restored = Window(), Window()
    window.add({"loss": torch.tensor(0.1)})
    restored.load(json.loads(json.dumps(window.state())), torch.device("cpu"))
    for each in (window, restored):
        each.add({"loss": torch.tensor(0.3)})
    assert restored.means(OneProcess()) == window.means(OneProcess())


def test_lines_after_a_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in (5, 10, 15):
        file.append({"step": step, "loss": float("nan")})
    with file.path.open("a") as raw:
        raw.write('{"step": 8, "lo')
    file.truncate(10)
    assert file.path.read_text() == '{"step": 5, "loss": null}\n{"step": 10, "loss": null}\n'


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path, enabled=False).append({"step": 1})
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*metrics\.jsonl"):
        MetricsFile(tmp_path / "missing").append({"step": 1})


def test_the_line_for_people_shows_what_there_is() -> None:
    line = one_line({"step": 5, "loss": 1.25, "ratio": 0.5, "lr": 1e-4, "loss_vb": 3.0})
    assert line == "step 5: loss 1.2500, compute 0.500, lr 1.00e-04"
