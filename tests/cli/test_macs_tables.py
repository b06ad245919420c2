"""``dydit macs``: what is in its tables, in every form, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dydit.cli.mac_networks import NetworkMacs
from dydit.cli.mac_sheets import as_text, network_sheet
from dydit.compute.table import MacTable
from dydit.costs import MLP, PARTS
from dydit.errors import DyditError
from dydit.models.presets import PRESETS
from dydit.training.folder import CONFIG_FILE, MODEL_FOLDER


def networks_of(command: Any, *words: object) -> list[dict[str, Any]]:
    outcome = command("macs", *words, "--format", "json")
    assert outcome.status == 0, outcome.err
    networks = json.loads(outcome.out)["networks"]
    for network in networks:
        assert network["analytic_equals_counted"] is True
        for row in (network, *network["rows"]):
            assert row["macs"] == row["counted_macs"]
            assert (row["gmacs"], row["gflops"]) == (row["macs"] / 1e9, 2 * row["gmacs"])
    return networks


def test_a_preset_in_words(command: Any) -> None:
    outcome = command("macs", "DiT-S/8")
    assert outcome.status == 0, outcome.err
    lines = {line.split("  ")[0]: line.split() for line in outcome.out.splitlines()}
    assert [part for part in PARTS if part in lines] == [part for part in PARTS if part != "routers"]
    # 0.36 GMACs in the paper.
    assert lines["total"] == ["total", "0.3586", "0.7172", "100.0%", "0.3586"]
    assert "1 GMAC = 1e9 multiply-adds = 2 GFLOPs" in outcome.out
    assert "equal in every block and part, to the last MAC" in outcome.out


@pytest.mark.parametrize("conditioning", ["in_context", "adaln_single"])
@pytest.mark.parametrize("by", ["part", "block"])
def test_rows_add_up(command: Any, conditioning: str, by: str) -> None:
    words = ("DiT-S/4", "--by", by, "--sample-size", "32x64", "--conditioning", conditioning)
    (network,) = networks_of(command, *words)
    assert network["name"] == "DiT-S/4"
    assert sum(row["macs"] for row in network["rows"]) == network["macs"]
    if by == "block":
        assert [row["block"] for row in network["rows"]] == [
            *(f"block {i}" for i in range(12)),
            "outside blocks",
        ]
        assert all(sum(row.get(part, 0) for part in PARTS) == row["macs"] for row in network["rows"])


def test_all_presets_reproduce_the_papers_range(command: Any) -> None:
    (sheet,) = networks_of_presets(command)
    assert [row["preset"] for row in sheet["rows"]] == list(PRESETS)
    for row in sheet["rows"]:
        assert row["macs"] == row["counted_macs"]
        if row["paper_gmacs"] is not None:
            assert row["gmacs"] == pytest.approx(row["paper_gmacs"], rel=2e-3, abs=6e-3)
    gmacs = {row["preset"]: round(row["gmacs"], 2) for row in sheet["rows"]}
    assert (gmacs["DiT-S/8"], gmacs["DiT-XL/2"]) == (0.36, 118.69)
    assert [row["preset"] for row in sheet["rows"] if row["paper_gmacs"] is None] == [
        "DiT-L/2", "DiT-L/4", "DiT-L/8",
    ]  # fmt: skip


def networks_of_presets(command: Any) -> list[dict[str, Any]]:
    outcome = command("macs", "--all-presets", "--json")
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)["networks"]


def test_a_dydit_has_a_static_and_a_masked_form(command: Any, models: Any) -> None:
    static, masked = networks_of(command, models.dynamic)
    assert [static["name"], masked["name"]] == ["static backbone", "DyDiT as trained"]
    # Masks multiply: the trained form saves nothing.
    assert masked["of_static"] == masked["macs"] / static["macs"] > 1
    extra = {row["part"]: row["macs"] for row in masked["rows"]}.pop("routers")
    assert masked["macs"] - static["macs"] == extra
    assert networks_of(command, models.static)[0]["macs"] == static["macs"]


def test_a_schedule_with_its_model(command: Any, models: Any, exported: Path) -> None:
    words = (models.dynamic, "--schedule", exported)
    static, _, engine = networks_of(command, *words)
    assert engine["macs"] < static["macs"] and engine["timesteps"] == 4
    assert "4 timesteps, each on one image of noise (seed 0)" in engine["conditions"]
    (by_step,) = networks_of(command, *words, "--by", "timestep")
    assert len(by_step["rows"]) == 4
    assert sum(row["macs"] for row in by_step["rows"]) / 4 == by_step["macs"] == engine["macs"]
    gmacs = [row["gmacs"] for row in by_step["rows"]]
    assert by_step["gmacs_range"] == [min(gmacs), max(gmacs)]
    assert all(0 < row["heads_on"] <= 1 and 0 <= row["tokens_kept"] <= 1 for row in by_step["rows"])
    # The export holds the weights too, so it can be given alone.
    assert networks_of(command, exported, "--by", "timestep") == [by_step]


def test_a_schedule_alone_tells_the_upper_bound(command: Any, exported: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "schedule.safetensors"):
        shutil.copy(exported / name, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    outcome = command("macs", tmp_path, "--by", "timestep", "--json")
    assert outcome.status == 0, outcome.err
    (engine,) = json.loads(outcome.out)["networks"]
    assert [row["macs"] for row in engine["rows"]] == manifest["macs_per_timestep_all_tokens"]
    assert {row["tokens_kept"] for row in engine["rows"]} == {1.0}
    assert {row["counted_macs"] for row in engine["rows"]} == {engine["analytic_equals_counted"]} == {None}
    text = command("macs", tmp_path).out
    assert "every token kept: an upper bound" in text and "–: not counted" in text
    (full,) = networks_of(command, exported, "--by", "timestep")
    assert full["macs"] < engine["macs"]


def test_a_run_is_counted_at_its_samplers_timesteps(
    command: Any, models: Any, finetune_yaml: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(models.dynamic, run / MODEL_FOLDER)
    shutil.copy(finetune_yaml, run / CONFIG_FILE)
    *_, engine = networks_of(command, run, "--by", "block")
    assert (engine["name"], engine["timesteps"]) == ("engine", 3)


def test_csv_is_a_table(command: Any, models: Any, exported: Path) -> None:
    outcome = command("macs", exported, "--by", "timestep", "--format", "csv")
    assert outcome.status == 0, outcome.err
    lines = list(csv.DictReader(io.StringIO(outcome.out)))
    assert [line["timestep"] for line in lines][-1] == "mean" and len(lines) == 5
    assert {line["network"] for line in lines} == {"engine"}
    assert all(line["macs"] == line["counted_macs"] and float(line["gflops"]) > 0 for line in lines)


def test_json_has_a_short_name(command: Any, models: Any) -> None:
    assert (
        command("macs", models.static, "--json").out == command("macs", models.static, "--format", "json").out
    )


def table(mlp: int) -> MacTable:
    return MacTable({"block 0": {MLP: mlp}})


def test_figures_that_differ_are_told_and_fail() -> None:
    network = NetworkMacs("x", "y", (table(4),), (table(5),))
    assert "DIFFERENT" in as_text("z", [network_sheet(network, "part", network)])
    with pytest.raises(DyditError, match="differ in 1 places: block 0, MLP: 4 and 5 MACs; expected equal"):
        network.check()


def test_so_does_what_was_not_counted() -> None:
    network = NetworkMacs("x", "y", (table(4),), (table(4),), {"aten::cdist": 3})
    assert "DIFFERENT" in as_text("z", [network_sheet(network, "part", network)])
    with pytest.raises(DyditError, match="aten::cdist ran 3 times, uncounted"):
        network.check()


def test_the_command_fails_when_they_differ(
    command: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dydit.cli.mac_networks.static_table", lambda shape: table(4))
    outcome = command("macs", models.static)
    assert "analytic and counted MACs differ" in outcome.error
    assert "DIFFERENT" in outcome.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["DiT-M/2"], "DiT-S/2"),
        (["nowhere"], "nowhere"),
        ([], "no model"),
        (["DiT-S/2", "--all-presets"], "--all-presets with a model"),
        (["--all-presets", "--by", "block"], "--all-presets with a model, --schedule or --by"),
        (["DiT-S/2", "--schedule", "x"], "--schedule for preset"),
        (["DiT-S/2", "--sample-size", "0"], "sample_size"),
        (["DiT-S/2", "--sample-size", "9"], "patch_size 2 does not divide sample_size 9"),
        (["DiT-S/2", "--sample-size", "axb"], "32x64 for height x width"),
        (["DiT-S/2", "--conditioning", "film"], "one of in_context, cross_attention"),
        (["DiT-S/8", "--by", "timestep"], "where every timestep costs the same"),
        (["DiT-S/2", "--format", "xml"], "'csv'"),
    ],
)
def test_mistakes(command: Any, words: list[str], part: str) -> None:
    assert part in command("macs", *words).error


def test_mistakes_about_models(command: Any, models: Any, exported: Path) -> None:
    assert "sha256" in command("macs", models.other, "--schedule", exported).error
    assert "manifest.json" in command("macs", models.dynamic, "--schedule", models.static).error
    assert "which has its own" in command("macs", models.static, "--sample-size", "16").error
    assert "where every timestep costs the same" in command("macs", models.dynamic, "--by", "timestep").error
