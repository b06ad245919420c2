from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_builders import TIMESTEPS, small_dydit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dydit
from dydit.config import DyDiTConfig
from dydit.errors import OutputError, ScheduleError
from dydit.export.artefact import MANIFEST, TENSORS, read_artefact, write_artefact
from dydit.export.schedule import SubnetSchedule


def some_schedule(**overrides: Any) -> SubnetSchedule:
    config = DyDiTConfig(mlp_groups=16, token_router_ratio=4, token_threshold=0.3)
    model = small_dydit(config=config, **overrides)
    return SubnetSchedule.from_model(model, TIMESTEPS, sampler={"name": "ddim", "steps": 3})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    some_schedule().save(folder)
    return folder


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln_single"])
def test_round_trip(conditioning: str, tmp_path: Path) -> None:
    schedule = some_schedule(conditioning=conditioning, sample_size=(4, 12))
    schedule.save(tmp_path / "new" / "export")
    loaded = SubnetSchedule.load(str(tmp_path / "new" / "export"))
    for name in ("timesteps", "shape", "routing", "weights", "sampler", "manifest"):
        assert getattr(loaded, name) == getattr(schedule, name), name
    for name in ("head_rows", "group_rows", "rows"):
        ours, theirs = getattr(loaded, name), getattr(schedule, name)
        assert ours.dtype == theirs.dtype and (ours == theirs).all(), name


def test_the_manifest_names_format_and_tool(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    assert (manifest["format_version"], manifest["dydit_version"]) == (1, dydit.__version__)


def test_saving_leaves_what_is_beside(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    for _ in range(2):
        some_schedule().save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "model.safetensors", TENSORS]
    assert (tmp_path / "model.safetensors").read_text() == "weights"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        some_schedule().save(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file(saved: Path, tmp_path: Path, name: str) -> None:
    for other in {MANIFEST, TENSORS} - {name}:
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    with pytest.raises(ScheduleError, match=rf"{name} cannot be read \(No such file.*`dydit export`"):
        SubnetSchedule.load(tmp_path)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_no_flipped_bit_passes(saved: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    for other in (MANIFEST, TENSORS):
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    content = bytearray((saved / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScheduleError):
        SubnetSchedule.load(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files(saved: Path, tmp_path: Path, name: str, share: float) -> None:
    for other in (MANIFEST, TENSORS):
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    content = (saved / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ScheduleError):
        SubnetSchedule.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format_version": 2}', "not JSON", '"\\ud800"'])
def test_a_manifest_of_something_else(saved: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ScheduleError, match=r"is not JSON|has format version .*; expected 1; export again"):
        SubnetSchedule.load(tmp_path)


def test_files_of_two_exports_do_not_mix(saved: Path, tmp_path: Path) -> None:
    some_schedule(seed=1).save(tmp_path)
    (tmp_path / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    with pytest.raises(ScheduleError, match="is not the file its manifest was written with; export again"):
        SubnetSchedule.load(tmp_path)


def test_edited_settings_are_refused(saved: Path, tmp_path: Path) -> None:
    """A threshold changed by hand would give another function under the same weights."""
    (tmp_path / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    text = (saved / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"token_threshold": 0.3', '"token_threshold": 0.4'))
    with pytest.raises(ScheduleError, match="manifest.json was changed after it was written"):
        SubnetSchedule.load(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(json.loads(text)))  # other spacing, same values
    assert SubnetSchedule.load(tmp_path).routing.token_threshold == 0.3


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        ({"rows": np.zeros((3, 3), np.int32)}, {}),
        ({"rows": np.full((3, 2), 99, np.int32)}, {}),
        ({"rows": np.full((3, 2), -1, np.int32)}, {}),
        ({}, {"routing": {"treshold": 1}}),
        ({}, {"shape": {}}),
        ({}, {"shape": None}),
        ({}, {"timesteps": [1.0]}),
        ({}, {"timesteps": 5}),
    ],
)
def test_parts_that_do_not_fit(
    saved: Path, tmp_path: Path, tensors: dict[str, np.ndarray], fields: dict[str, Any]
) -> None:
    """Written with matching checksums, as by another program."""
    good_tensors, good_fields = read_artefact(saved)
    write_artefact(tmp_path, {**good_tensors, **tensors}, {**good_fields, **fields})
    with pytest.raises(ScheduleError, match="holds a broken schedule"):
        SubnetSchedule.load(tmp_path)


def test_a_lacking_field_or_tensor(saved: Path, tmp_path: Path) -> None:
    tensors, fields = read_artefact(saved)
    for name in ("timesteps", "routing", "weights_sha256", "sampler"):
        write_artefact(tmp_path, tensors, {k: v for k, v in fields.items() if k != name})
        with pytest.raises(ScheduleError, match=f"broken schedule .*{name}"):
            SubnetSchedule.load(tmp_path)
    for name in tensors:
        write_artefact(tmp_path, {k: v for k, v in tensors.items() if k != name}, fields)
        with pytest.raises(ScheduleError, match=f"broken schedule .*{name}"):
            SubnetSchedule.load(tmp_path)
