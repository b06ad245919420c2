"""``dydit bench``: presets and models from the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_builders import peaks_in_this_process
from calibration_builders import routed_dydit
from core_builders import small_dit, small_inputs
from safetensors.torch import save_file

from dydit.benchmark import peaks
from dydit.cli.sizes import parse_bytes
from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.errors import ConfigError
from dydit.models.dit import DiT

TINY = ("DiT-S/2", "--depth", "2", "--sample-size", "8", "--no-memory", "--rounds", "2")
ONE = ("--batch", "1", "--dtype", "fp32", "--device", "cpu")


def bench(command: Any, out: Path, *words: object) -> dict[str, Any]:
    outcome = command("bench", *words, "--out", out)
    assert outcome.status == 0, outcome.err
    assert f"wrote {out}" in outcome.out
    document = json.loads((out / "bench.json").read_text())
    assert document["finished"] is not None
    return document


def test_a_preset(command: Any, tmp_path: Path) -> None:
    words = (
        "--guidance",
        "--whole-run",
        "3",
        "--sampler",
        "dpm++",
        "--threads",
        "1",
        "--memory-budget",
        "1GB",
    )
    found = bench(command, tmp_path / "bench", *TINY, *ONE, *words)
    (case,) = found["cases"]
    assert (case["batch"], case["rows"], case["tokens"], case["depth"]) == (1, 2, 16, 2)
    assert (case["whole_run"]["sampler"], case["whole_run"]["steps"]) == ("dpm++", 3)
    assert case["whole_run"]["guidance_scale"] == 1.5
    assert found["settings"]["memory_budget"] == 10**9
    assert found["machine"]["threads"] == 1
    assert found["command"] == (
        "dydit bench DiT-S/2 --depth 2 --sample-size 8 --sampler dpm++ --guidance --batch 1 --dtype fp32 "
        "--rounds 2 --whole-run 3 --no-memory --memory-budget 1000000000 --threads 1"
    )
    # The command in the file is one that measures the same again.
    again = bench(command, tmp_path / "again", *found["command"].split()[2:], "--device", "cpu")
    assert {**again["settings"], "device": "cpu"} == found["settings"]
    assert again["cases"][0]["macs"] == case["macs"]


def test_the_table_is_printed(command: Any, tmp_path: Path) -> None:
    outcome = command("bench", *TINY, *ONE, "--mode", "exact", "--out", tmp_path / "bench")
    header, rule, row = outcome.out.split("\n\n")[1].splitlines()
    assert header.split()[:3] == ["batch", "dtype", "mode"] and set(rule) == {"-", " "}
    assert row.split()[:3] == ["1", "fp32", "exact"]
    assert {path.name for path in (tmp_path / "bench").iterdir()} == {"bench.json", "bench.md", "bench.png"}


def test_a_model_with_its_schedule(command: Any, models: Any, exported: Path, tmp_path: Path) -> None:
    words = (models.dynamic, "--schedule", exported, "--whole-run", "4", "--no-memory", "--rounds", "2", *ONE)
    (case,) = bench(command, tmp_path / "bench", *words)["cases"]
    assert case["whole_run"]["steps"] == 4
    assert case["timesteps"] == sorted(case["timesteps"], reverse=True)
    assert set(case["macs"]) == {"static", "exact", "capacity"}


def test_a_model_is_exported_on_the_fly(command: Any, models: Any, tmp_path: Path) -> None:
    words = (models.dynamic, "--no-memory", "--rounds", "1", "--mode", "capacity", *ONE, "--whole-run", "2")
    (case,) = bench(command, tmp_path / "bench", *words)["cases"]
    assert case["whole_run"]["macs"]["capacity"] < case["whole_run"]["macs"]["static"]
    assert case["rows"] == 1


def test_a_model_that_was_never_trained(command: Any, tmp_path: Path) -> None:
    """Its output is zero, in either mode."""
    fresh = DiT(sample_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=10).eval()
    convert(fresh, DyDiTConfig(token_router_ratio=4)).save_pretrained(tmp_path / "model")
    words = (tmp_path / "model", "--rounds", "1", "--no-memory", *ONE, "--whole-run", "2")
    (case,) = bench(command, tmp_path / "bench", *words)["cases"]
    assert case["capacity_difference"] == 0.0


def test_outputs_that_are_no_numbers_are_refused(command: Any, tmp_path: Path) -> None:
    model = routed_dydit()
    with torch.no_grad():
        model.backbone.final_layer.linear.bias.fill_(1e6)  # beyond float16
    model.save_pretrained(tmp_path / "model")
    words = (tmp_path / "model", "--rounds", "1", "--no-memory", "--batch", "1", "--device", "cpu")
    told = command("bench", *words, "--dtype", "fp16", "--whole-run", "2", "--out", tmp_path / "bench").error
    assert "in torch.float16 that are not finite; expected numbers; measure in another --dtype" in told


def test_guidance_without_a_null_class_is_told_before_any_work(command: Any, tmp_path: Path) -> None:
    backbone = small_dit(null_class=False)
    convert(backbone, DyDiTConfig(token_router_ratio=4)).save_pretrained(tmp_path / "model")
    told = command("bench", tmp_path / "model", "--guidance", *ONE, "--out", tmp_path / "bench").error
    assert "has no null class; expected a scale of 1; add --no-guidance" in told


def test_a_model_that_takes_text(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "subprocess", SimpleNamespace(run=peaks_in_this_process))
    model, texts = routed_dydit(conditioning="adaln_single"), tmp_path / "texts.safetensors"
    model.save_pretrained(tmp_path / "model")
    save_file({"texts": small_inputs(model.shape, batch=2)[1]}, texts)
    words = (
        tmp_path / "model",
        "--rounds",
        "1",
        "--mode",
        "capacity",
        "--guidance",
        *ONE,
        "--whole-run",
        "2",
    )
    (case,) = bench(command, tmp_path / "bench", *words, "--texts", texts)["cases"]
    assert case["macs"]["capacity"] < case["macs"]["static"] and case["rows"] == 2
    assert set(case["memory"]["peaks"]) == {"static", "capacity"}
    told = command("bench", *words, "--out", tmp_path / "other").error
    assert "a model that takes text, without any; expected texts as its encoder gives them" in told
    told = command("sample", tmp_path / "model", "--labels", "0", "--out", tmp_path / "other").error
    assert "takes text; expected a model of class labels" in told
    assert not (tmp_path / "other" / "bench.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("DiT-XXL/2",), "unknown preset 'DiT-XXL/2'"),
        (("nothing/here",), "nothing/here"),
        ((*TINY, "--ratio", "0"), "ratio is 0.0"),
        ((*TINY, "--ratio", "0.01"), "always on"),
        ((*TINY, "--batch", "two"), "--batch is 'two'; expected whole numbers"),
        ((*TINY, "--batch", "0"), "--batch is '0'; expected whole numbers from 1 up"),
        ((*TINY, "--batch", "2,2"), "each value once"),
        ((*TINY, "--dtype", "fp64"), "--dtype is 'fp64'; expected fp32, bf16, fp16"),
        ((*TINY, "--mode", "exact, fast"), "--mode is 'exact, fast'; expected exact, capacity"),
        ((*TINY, "--memory-budget", "much"), "--memory-budget much; expected a size such as 1.5GB"),
        ((*TINY, "--memory-budget", "1KB"), "memory budget of 1000 bytes"),
        ((*TINY, "--memory-budget", "1KB", "--memory"), "memory budget of 1000 bytes"),
        ((*TINY, "--schedule", "x"), "--schedule for preset DiT-S/2"),
        ((*TINY, "--texts", "x"), "--texts for preset DiT-S/2; expected a model that takes text"),
        (("DiT-S/2", "--sample-size", "7"), "patch_size 2 does not divide"),
        ((*TINY, "--whole-run", "2000"), "2000"),
        ((*TINY, "--whole-rounds", "2"), "--whole-rounds 2 without --whole-run; add --whole-run"),
    ],
)
def test_mistakes_are_told_in_one_line(command: Any, tmp_path: Path, words: Any, told: str) -> None:
    assert told in command("bench", *words, *_cpu(words), "--out", tmp_path / "bench").error
    assert not (tmp_path / "bench" / "bench.json").exists()


def _cpu(words: tuple[object, ...]) -> tuple[object, ...]:
    """The smallest case, under what was given."""
    given = {ONE[i]: ONE[i : i + 2] for i in (0, 2, 4)}
    return tuple(word for option, pair in given.items() if option not in words for word in pair)


def test_what_a_model_does_not_take(command: Any, models: Any, exported: Path, tmp_path: Path) -> None:
    out = ("--no-memory", "--out", tmp_path / "bench")
    assert "a preset" in command("bench", models.dynamic, "--depth", "2", *out).error
    assert "a preset" in command("bench", models.dynamic, "--sweep", "tokens", *out).error
    for ratio in ("0.3", "0.5"):
        told = command("bench", models.dynamic, "--ratio", ratio, *out).error
        assert f"--ratio {ratio} for {models.dynamic}; expected a preset" in told
    assert "static" in command("bench", models.static, *out).error
    wrong = command("bench", models.other, "--schedule", exported, *out).error
    assert "sha256" in wrong
    steps = command("bench", models.dynamic, "--schedule", exported, "--whole-run", "5", *out).error
    assert "--whole-run 5 with a schedule of 4 steps" in steps


def test_the_ratio_of_a_preset(command: Any, tmp_path: Path) -> None:
    words = (*TINY, *ONE, "--mode", "exact", "--rounds", "1")
    given = bench(command, tmp_path / "given", *words, "--ratio", "0.7")
    left_out = bench(command, tmp_path / "left_out", *words)
    assert (given["settings"]["ratio"], left_out["settings"]["ratio"]) == (0.7, 0.5)
    assert "--ratio 0.7" in given["command"] and "--ratio" not in left_out["command"]


def test_compiling_without_a_compiler_is_refused_before_any_work(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = command("bench", *TINY, *ONE, "--compile", "--out", tmp_path / "bench").error
    assert "--compile without a C++ compiler" in told and "leave --compile out" in told
    assert not (tmp_path / "bench").exists()


def test_a_folder_with_other_files_is_refused_before_the_work(
    command: Any, tmp_path: Path, blocked: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other files" in command("bench", *TINY, *ONE, "--out", tmp_path).error
    assert str(blocked) in command("bench", *TINY, *ONE, "--out", blocked).error


def test_help_shows_an_example(command: Any) -> None:
    shown = command("bench", "--help")
    assert shown.status == 0 and "Example: dydit bench DiT-XL/2" in shown.out
    for option in ("--ratio", "--whole-run", "--sweep", "--memory-budget", "--compile", "--no-guidance"):
        assert option in shown.out


def test_sizes_in_bytes() -> None:
    sizes = {"1.5GB": 1_500_000_000, "800MiB": 800 * 2**20, "2000000": 2_000_000, "3 kb": 3000, "7B": 7}
    assert {text: parse_bytes("--x", text) for text in sizes} == sizes
    assert parse_bytes("--x", None) is None
    for text in ("", "GB", "-1", "1.5.2GB", "3 furlongs", "0", "0.1B"):
        with pytest.raises(ConfigError, match="--x"):
            parse_bytes("--x", text)
