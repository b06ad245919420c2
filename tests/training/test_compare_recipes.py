"""tools/compare_recipes.py: a finished run is not repeated, and never taken for one of other settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import dydit
from dydit.config import RunConfig, dump_config

TOOL = Path(dydit.__file__).parents[1] / "tools" / "compare_recipes.py"


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The tool's command line, as a function of its arguments; gives the names of the runs that it started.

    Runs only save their configuration; the measures of each are its seed, and that of seed 2 is stopped.
    """
    spec = importlib.util.spec_from_file_location("compare_recipes", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    started: list[str] = []

    def run_variant(cfg: RunConfig) -> dict[str, float]:
        folder = Path(cfg.output_dir)
        started.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(cfg))
        if cfg.seed == 2 and len(started) > 1:
            raise SystemExit("stopped")
        return dict.fromkeys((key for key, _ in tool.COLUMNS.values()), float(cfg.seed))

    def call(*arguments: str) -> list[str]:
        started.clear()
        monkeypatch.setattr("sys.argv", ["compare_recipes.py", "--out", str(tmp_path), *arguments])
        tool.main()
        return started

    monkeypatch.setattr(tool, "run_variant", run_variant)
    return call


def test_only_what_is_missing_is_run(
    compare: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="stopped"):
        compare("base=", "--seeds", "0", "2")
    assert compare("base=", "--seeds", "0", "2") == ["base-2"]
    assert compare("base=", "--seeds", "0", "2") == []
    assert "| base | 1.000 (0.000, 2.000) |" in capsys.readouterr().out


def test_a_variant_whose_settings_changed_is_refused(compare: Callable[..., list[str]]) -> None:
    """Its folder holds the run of the former ones, which ``auto`` would go on with, or take for finished."""
    compare("fast=train.lr=1e-3")
    for arguments in (
        ["fast=train.lr=1e-4"],
        ["fast=train.lr=1e-3", "--config", "configs/digits_smoke.yaml"],
    ):
        with pytest.raises(SystemExit, match=r"fast-0/config\.yaml has other settings; give the variant"):
            compare(*arguments)
    assert compare("faster=train.lr=1e-4") == ["faster-0"]
