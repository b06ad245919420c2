"""``dydit macs``, ``dydit report`` and ``dydit quickstart``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dydit.cli.mac_rows import MacRow, rows_as_text


def test_macs_of_a_preset(command: Any) -> None:
    outcome = command("macs", "DiT-S/2")
    assert outcome.status == 0, outcome.err
    # 6.06 GMACs in the paper, which leaves small terms out.
    assert "6.07" in outcome.out and "12.13" in outcome.out
    assert "not counted" not in outcome.out


def test_macs_of_a_schedule(command: Any, models: Any, exported: Path) -> None:
    outcome = command("macs", models.dynamic, "--schedule", exported, "--json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    static, masked, engine = (row["gmacs"] for row in rows)
    assert engine < static < masked  # masks multiply: the trained form saves nothing
    assert [row["unsupported"] for row in rows] == [{}, {}, {}]
    assert all(row["gflops"] == 2 * row["gmacs"] for row in rows)
    assert rows[2]["timesteps"] == 4


def test_macs_in_words(command: Any, models: Any, exported: Path) -> None:
    outcome = command("macs", models.dynamic, "--schedule", exported)
    assert "GMACs" in outcome.out and "GFLOPs" in outcome.out and "over 4 timesteps" in outcome.out
    assert command("macs", models.static).status == 0


def test_what_was_not_counted_is_shown() -> None:
    assert "not counted: aten::bmm (3 times)" in rows_as_text(
        [MacRow("x", 1.0, unsupported={"aten::bmm": 3})]
    )


def test_macs_mistakes(command: Any, models: Any, exported: Path) -> None:
    assert "DiT-S/2" in command("macs", "DiT-M/2").error
    assert "nowhere" in command("macs", "nowhere").error
    assert "sha256" in command("macs", models.other, "--schedule", exported).error
    assert "manifest.json" in command("macs", models.dynamic, "--schedule", models.static).error


def test_report_of_no_run(command: Any, tmp_path: Path) -> None:
    assert "summary.json" in command("report", tmp_path).error
    assert list(tmp_path.iterdir()) == []


def test_report(command: Any, tmp_path: Path, blocked: Path) -> None:
    from dydit.report.storage import write_summary
    from dydit.report.summary import Conditions, Summary

    conditions = Conditions(
        model="DiT", dataset="digits", target_ratio=0.5, seed=0, sampler="ddim", sampling_steps=4,
        guidance_scale=1.0, batch_size=1, torch_version="2", dydit_version="0",
    )  # fmt: skip
    run = tmp_path / "run"
    write_summary(Summary(conditions=conditions), run)
    assert command("report", run).status == 0
    assert command("report", run, "--out", tmp_path / "page.html").status == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()
    assert str(blocked) in command("report", run, "--out", blocked).error


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.5", "nan"])
def test_quickstart_refuses_a_ratio_before_it_imports_anything(
    command: Any, monkeypatch: pytest.MonkeyPatch, ratio: str
) -> None:
    monkeypatch.setitem(sys.modules, "dydit.quickstart", None)  # importing it would fail
    assert "--ratio is" in command("quickstart", f"--ratio={ratio}").error


def test_quickstart_passes_its_options_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(
        sys.modules, "dydit.quickstart", SimpleNamespace(run_quickstart=lambda *a: calls.append(a))
    )
    assert command("quickstart").status == 0
    assert command("quickstart", "--steps", "3", "--ratio", "0.7", "--out", "x", "--seed", "5").status == 0
    assert calls == [(None, None, None, None), (3, 0.7, "x", 5)]
