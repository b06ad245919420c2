"""The frame around the verbs: help, version, mistakes in one line, Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import dydit
import dydit.config
from dydit.cli.app import main
from dydit.cli.execution import check_aot_compiler, check_compiler
from dydit.cli.sampler_options import SamplerChoice
from dydit.config.sections import SamplerName
from dydit.deployment.folder import compiles_for
from dydit.errors import ConfigError

VERBS = ("quickstart", "pretrain", "finetune", "export", "sample", "macs", "report")


def test_help_names_every_verb(command: Any) -> None:
    outcome = command("--help")
    assert outcome.status == 0
    for verb in VERBS:
        assert f"\n  {verb} " in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(command: Any, verb: str) -> None:
    outcome = command(verb, "--help")
    assert outcome.status == 0
    assert f"Example: dydit {verb}" in outcome.out


def test_help_imports_nothing_heavy() -> None:
    # This is what keeps help fast; the seconds themselves are the machine's.
    heavy = {"torch", "timm", "diffusers", "accelerate", "numpy", "matplotlib", "plotly", "jinja2", "rich"}
    code = (
        "import sys\n"
        "from dydit.cli.app import main\n"
        "assert main(['sample', '--help']) == main(['--help']) == 0\n"
        f"sys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(command: Any) -> None:
    outcome = command("--version")
    assert (outcome.status, outcome.out) == (0, f"dydit {dydit.__version__}\n")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["bake"], "No such command 'bake'; see dydit --help"),
        (["sample", "--colour"], "No such option: --colour"),
        (["sample", "x", "--out", "y"], "Missing option '--labels'"),
        (["sample", "x", "--labels", "1", "--out", "y", "--sampler", "euler"], "'flow_euler'"),
        (["export"], "Missing"),
    ],
)
def test_wrong_words_are_told_in_one_line(command: Any, words: list[str], part: str) -> None:
    assert part in command(*words).error


@pytest.mark.parametrize(
    "words", [["--debug", "finetune", "none.yaml"], ["finetune", "none.yaml", "--debug"]]
)
def test_debug_shows_the_traceback(words: list[str]) -> None:
    with pytest.raises(dydit.DyditError, match="none.yaml"):
        main(words)


def test_interruption(command: Any, monkeypatch: pytest.MonkeyPatch, finetune_yaml: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dydit.config, "load_config", interrupt)
    outcome = command("finetune", finetune_yaml)
    assert (outcome.status, outcome.err) == (130, "error: interrupted\n")


def test_other_trouble_with_files_is_one_line(
    command: Any, monkeypatch: pytest.MonkeyPatch, finetune_yaml: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(dydit.config, "load_config", fail)
    assert "No space left on device: 'somewhere'" in command("finetune", finetune_yaml).error


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, finetune_yaml: Path) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("not the user's")

    monkeypatch.setattr(dydit.config, "load_config", fail)
    with pytest.raises(AssertionError):
        main(["finetune", str(finetune_yaml)])


def test_sampler_choices_are_those_of_the_configuration() -> None:
    assert {choice.value for choice in SamplerChoice} == set(get_args(SamplerName))


class OutOfMemoryError(RuntimeError):
    """Called like torch's."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(
    command: Any, monkeypatch: pytest.MonkeyPatch, finetune_yaml: Path, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(dydit.config, "load_config", fail)
    assert "out of memory; make the batch smaller" in command("finetune", finetune_yaml).error
    with pytest.raises(type(error)):
        main(["finetune", str(finetune_yaml), "--debug"])


def test_an_error_of_torch_that_is_no_lack_of_memory_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, finetune_yaml: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(dydit.config, "load_config", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["finetune", str(finetune_yaml)])


def test_sigterm_leaves_nothing_half_written(models: Any, tmp_path: Path) -> None:
    """In a process of its own: the signal comes while the export's temporary folder is there."""
    code = f"""
import os, signal, sys
from dydit.cli.app import main
from dydit.cli.execution import check_aot_compiler, check_compiler
from dydit.dynamic.dydit import DyDiT

def save(*_):
    assert len(os.listdir({str(tmp_path)!r})) == 1
    os.kill(os.getpid(), signal.SIGTERM)

DyDiT.save_pretrained = save
words = ["--steps=2", "--with-weights", {f"--out={tmp_path / 'e'}"!r}]
sys.exit(main(["export", {str(models.dynamic)!r}, *words]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU inductor writes C++, on a GPU Triton C; AOTInductor needs the CUDA toolkit for one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for device, kind in (("cpu", r"C\+\+"), ("cuda", "C")):
        with pytest.raises(ConfigError, match=rf"--compile without a {kind} compiler; expected g"):
            check_compiler("--compile", device)
    with pytest.raises(ConfigError, match=r"--aot-compile without a C\+\+ compiler"):
        check_aot_compiler("--aot-compile")
    for name in ("g++", "clang"):
        (tmp_path / name).touch(0o755)
    check_compiler("--compile", "cpu")
    check_compiler("--compile", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(ConfigError, match="--aot-compile without the CUDA toolkit; expected nvcc"):
        check_aot_compiler("--aot-compile")
    assert compiles_for("cpu") and not compiles_for("cuda")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    check_aot_compiler("--aot-compile")
