"""``dydit report`` and ``dydit quickstart``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


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
    assert (
        command(
            "quickstart", "--steps", "3", "--ratio", "0.7", "--out", "x", "--seed", "5", "--control"
        ).status
        == 0
    )
    assert calls == [(None, None, None, None, False), (3, 0.7, "x", 5, True)]
