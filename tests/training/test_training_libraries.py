"""Data sets of other libraries, with stand-ins for those: what is asked of them, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.training.data import make_dataset


def picture(grey: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


def encoded(grey: int) -> bytes:
    buffer = io.BytesIO()
    picture(grey).save(buffer, "png")
    return buffer.getvalue()


class ClassLabel:
    num_classes = 7


class Value:
    pass


ImageFeature = type("Image", (), {})


class Rows:
    """As a ``datasets.Dataset``: rows by index, columns by name."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows = features, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def hub(**changes: Any) -> Any:
    return make_dataset(DataConfig(**{"name": "hf_datasets", "path": "saved", "image_size": 8, **changes}))


def test_a_saved_folder_of_the_datasets_library(datasets: Any) -> None:
    rows = [{"picture": picture(0), "kind": 3}, {"picture": picture(255), "kind": 6}]
    datasets.load_from_disk = lambda path: Rows({"kind": ClassLabel(), "picture": ImageFeature()}, rows)
    found = hub()
    assert (len(found), found.num_classes, found.sample_shape) == (2, 7, (3, 8, 8))
    image, label = found[1]
    assert label == 6 and image.shape == (3, 8, 8) and image.eq(1).all()
    assert found[0][0].eq(-1).all()


def test_plain_numbers_are_labels_too(datasets: Any) -> None:
    rows = [{"image": picture(0), "label": 4}, {"image": picture(0), "label": 1}]
    datasets.load_from_disk = lambda path: Rows({"image": ImageFeature(), "label": Value()}, rows)
    assert hub().num_classes == 5


def test_a_folder_without_images_or_with_splits_is_refused(datasets: Any) -> None:
    datasets.load_from_disk = lambda path: Rows({"text": Value()}, [])
    with pytest.raises(DataError, match="saved has the columns text; expected one of type Image"):
        hub()
    datasets.load_from_disk = lambda path: {"train": None, "test": None}
    with pytest.raises(DataError, match="saved has the splits train, test; give the path of one"):
        hub()

    def broken(path: str) -> Any:
        raise FileNotFoundError("no dataset_info.json")

    datasets.load_from_disk = broken
    with pytest.raises(DataError, match=r"not a folder of the datasets library \(no dataset_info"):
        hub()


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    """Shards a.tar and b.tar, with what ``wids`` would read from them."""
    content: dict[str, list[dict[str, Any]]] = {
        "a.tar": [{"__key__": "0", ".png": encoded(0), ".cls": b"3\n"}],
        "b.tar": [
            {"__key__": "1", ".png": encoded(255), ".cls": b"5"},
            {"__key__": "2", ".png": io.BytesIO(encoded(255)), ".cls": io.BytesIO(b"6")},
        ],
    }
    module = ModuleType("wids")
    module.IndexedTarSamples = lambda path: content[Path(path).name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wids", module)
    for name in content:
        (tmp_path / name).write_bytes(b"")
    return content


def test_shards_are_one_sequence(shards: Any, tmp_path: Path) -> None:
    found = make_dataset(DataConfig(name="webdataset", path=str(tmp_path), image_size=8))
    assert [found[i][1] for i in range(len(found))] == [3, 5, 6]
    assert found[0][0].eq(-1).all() and found[2][0].eq(1).all() and found[2][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({".cls": None}, r"b\.tar, sample 1 lacks \.cls"),
        ({".png": None}, r"b\.tar, sample 1 lacks an image"),
        ({".cls": b"cat"}, r"b\.tar, sample 1 cannot be read"),
        ({".png": b"no image"}, r"b\.tar, sample 1 cannot be read"),
    ],
)
def test_a_bad_sample_is_named(shards: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shards["b.tar"][0] = {k: v for k, v in {**shards["b.tar"][0], **change}.items() if v is not None}
    found = make_dataset(DataConfig(name="webdataset", path=str(tmp_path), image_size=8))
    with pytest.raises(DataError, match=message):
        found[1]
    assert torch.equal(found[0][0], -torch.ones(3, 8, 8))


def test_a_folder_without_shards_is_refused(shards: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none has no shards; expected files \*\.tar"):
        make_dataset(DataConfig(name="webdataset", path=str(tmp_path / "none"), image_size=8))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("hf_datasets", "datasets", "datasets"), ("webdataset", "wids", "webdataset")],
)
def test_a_missing_library_and_a_missing_size_are_told(
    name: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=f"{package} is not installed; pip install {package}"):
        make_dataset(DataConfig(name=name, path="somewhere", image_size=8))
    with pytest.raises(ConfigError, match=f"image_size is empty with data.name {name}"):
        make_dataset(DataConfig(name=name, path="somewhere"))
