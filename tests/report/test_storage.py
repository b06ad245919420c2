from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dydit.errors import DataError, OutputError
from dydit.report.storage import ARRAYS_NAME, SUMMARY_NAME, load_summary, write_summary
from dydit.report.summary import Summary, SummaryArrays

from . import synthetic


def test_what_is_written_is_loaded_back(folder: Path, summary: Summary) -> None:
    loaded = load_summary(folder)
    assert loaded.model_dump() == summary.model_dump()
    assert loaded.arrays.present().keys() == summary.arrays.present().keys()
    for name, array in summary.arrays.present().items():
        np.testing.assert_array_equal(getattr(loaded.arrays, name), array)
        assert getattr(loaded.arrays, name).dtype == array.dtype


def test_an_empty_summary_survives_too(tmp_path: Path, bare_summary: Summary) -> None:
    write_summary(bare_summary, tmp_path / "new" / "folder")
    assert load_summary(tmp_path / "new" / "folder").model_dump() == bare_summary.model_dump()


def test_strided_arrays_keep_their_values(tmp_path: Path) -> None:
    labels = np.arange(8)[::2]
    images = np.arange(4 * 8 * 8, dtype=np.float32).reshape(8, 8, 1, 4).T.copy()[:4].transpose(0, 1, 3, 2)
    arrays = SummaryArrays(backbone_samples=images, dydit_samples=images[::-1], sample_labels=labels)
    write_summary(Summary(conditions=synthetic.conditions(), arrays=arrays), tmp_path)
    loaded = load_summary(tmp_path).arrays
    assert loaded.sample_labels is not None and loaded.dydit_samples is not None
    np.testing.assert_array_equal(loaded.sample_labels, labels)
    np.testing.assert_array_equal(loaded.dydit_samples, images[::-1])


def test_json_lists_the_derived_figures_for_other_readers(folder: Path, summary: Summary) -> None:
    derived = json.loads((folder / SUMMARY_NAME).read_text())["derived"]
    assert derived["compute_ratio"] == pytest.approx(summary.compute.ratio)
    assert derived["realised_share"] == pytest.approx(summary.realised_share)


def test_only_the_two_files_are_left(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {SUMMARY_NAME, ARRAYS_NAME}


def _damage_json(folder: Path, **changes: object) -> None:
    document = json.loads((folder / SUMMARY_NAME).read_text())
    (folder / SUMMARY_NAME).write_text(json.dumps({**document, **changes}))


def test_missing_and_damaged_files_are_told_in_one_line(tmp_path: Path, summary: Summary) -> None:
    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            load_summary(tmp_path)
        assert "\n" not in str(caught.value)

    refused(f"cannot read .*{SUMMARY_NAME}.*finished run")
    write_summary(summary, tmp_path)
    whole = (tmp_path / ARRAYS_NAME).read_bytes()
    (tmp_path / ARRAYS_NAME).write_bytes(whole[: len(whole) // 2])
    refused("is not the file that summary.json was written with")
    (tmp_path / ARRAYS_NAME).unlink()
    refused(f"cannot read .*{ARRAYS_NAME}")
    write_summary(summary, tmp_path)
    _damage_json(tmp_path, format_version=99)
    refused("format version 99; expected version 1")
    write_summary(summary, tmp_path)
    _damage_json(tmp_path, summary={"conditions": {}})
    refused("conditions.model: Field required")
    (tmp_path / SUMMARY_NAME).write_text('{"format_version": 1, ')
    refused("is not JSON")
    (tmp_path / SUMMARY_NAME).write_bytes(b"\xff\xfe\x00 not text")
    refused("is not JSON")
    (tmp_path / SUMMARY_NAME).write_text("[1]")
    refused("format version None")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, bare_summary: Summary) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_summary(bare_summary, tmp_path / "file")
