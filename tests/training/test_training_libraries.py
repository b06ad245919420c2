"""Hugging Face `datasets` folders, with a stand-in for that library, and webdataset shards."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.shapes import ModelShape
from dydit.training.data import check_fits, make_dataset
from dydit.training.samples import batches

SHAPE = ModelShape(
    sample_size=(8, 8), patch_size=2, in_channels=3, out_channels=6, hidden_size=32, depth=2, num_heads=4,
    mlp_hidden=128, mlp_groups=4, num_classes=10,
)  # fmt: skip


def picture(grey: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


def encoded(grey: int) -> bytes:
    buffer = io.BytesIO()
    picture(grey).save(buffer, "png")
    return buffer.getvalue()


def broken() -> bytes:
    """A PNG that opens, and at whose second chunk of pixels Pillow raises a SyntaxError."""
    png = encoded(0)
    at = png.index(b"IDAT")
    half = int.from_bytes(png[at - 4 : at], "big") // 2
    return png[: at - 4] + half.to_bytes(4, "big") + png[at : at + 4 + half] + bytes(12)


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


def first_batch(dataset: Any, **changes: Any) -> torch.Tensor:
    config = DataConfig(**{"batch_size": 2, **changes})
    return next(batches(dataset, config, SHAPE, seed=0)).images


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


def test_an_image_that_its_decoder_gives_up_on_is_named_or_skipped(
    datasets: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SyntaxError, match="broken PNG file"):
        Image.open(io.BytesIO(broken())).load()
    # The library opens images without reading their pixels.
    rows = [{"image": Image.open(io.BytesIO(png)), "label": 1} for png in (encoded(0), broken())]
    datasets.load_from_disk = lambda path: Rows({"image": ImageFeature(), "label": ClassLabel()}, rows)
    with pytest.raises(DataError, match=r"saved, row 1 cannot be read \(broken PNG file"):
        hub()[1]
    assert len(first_batch(hub(), on_bad="skip")) == 2
    (message,) = caplog.messages
    assert message.startswith("skipped: sample 1 cannot be read: saved, row 1 cannot be read (broken PNG")


def test_a_row_with_a_bad_label_is_named(datasets: Any) -> None:
    rows = [{"image": picture(0), "label": -1}]  # how that library marks what has no label
    datasets.load_from_disk = lambda path: Rows({"image": ImageFeature(), "label": ClassLabel()}, rows)
    with pytest.raises(DataError, match=r"sample 0 \(saved, row 0\) has label -1; expected 0 to 9"):
        first_batch(hub())


def test_a_row_with_a_label_that_no_table_has_room_for_is_named_or_skipped(
    datasets: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": picture(0), "label": label} for label in (4, 10**9)]
    datasets.load_from_disk = lambda path: Rows({"image": ImageFeature(), "label": Value()}, rows)
    with pytest.raises(
        DataError, match=r"saved, row 1 has label 1000000000, .*labels below 1,000,000; correct"
    ):
        hub()
    assert hub(on_bad="skip").num_classes == 5
    assert len(first_batch(hub(on_bad="skip"), on_bad="skip")) == 2
    assert caplog.messages == ["skipped: sample 1 (saved, row 1) has label 1000000000; expected 0 to 9"]


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


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for ending, content in files.items():
                add(archive, f"{key}.{ending}", content)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "a.tar", {"x/0": {"png": encoded(0), "cls": b"3\n", "json": b"{}"}})
    ones = {key: {"cls": label, "png": encoded(255)} for key, label in (("1", b"5"), ("2", b"6"))}
    shard(folder / "b.tar", ones)
    return folder


def sharded(folder: Path, **changes: Any) -> Any:
    return make_dataset(DataConfig(**{"name": "webdataset", "path": str(folder), "image_size": 8, **changes}))


def test_shards_are_one_sequence(shards: Path) -> None:
    found = sharded(shards)
    assert [found[i][1] for i in range(len(found))] == [3, 5, 6] and found.num_classes == 7
    assert found[0][0].eq(-1).all() and found[2][0].eq(1).all() and found[2][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": b""}, r"c\.tar, sample 9 lacks \.cls"),
        ({"cls": b"1"}, r"c\.tar, sample 9 lacks an image"),
        ({"png": b"", "cls": b"cat"}, r"c\.tar, sample 9 has the label b'cat'; expected a whole number"),
        (
            {"png": b"", "cls": b"1000000000"},  # a table of so many rows fills the memory
            r"c\.tar, sample 9 has the label b'1000000000'; expected a whole number below 1,000,000",
        ),
    ],
)
def test_a_bad_sample_is_named_or_left_out(
    shards: Path, sample: dict[str, bytes], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard(shards / "c.tar", {"9": sample})
    with pytest.raises(DataError, match=message + ".*; repair it, or set data.on_bad=skip"):
        sharded(shards)
    assert not caplog.messages
    assert len(sharded(shards, on_bad="skip")) == 3
    (said,) = caplog.messages
    assert said.startswith(f"{shards}: 1 skipped (data.on_bad=skip), the first: ") and re.search(
        message, said
    )


def test_everything_left_out_is_logged(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(shards / "c.tar", {"8": {"cls": b"1"}, "9": {"png": b""}})
    sharded(shards, on_bad="skip")
    assert caplog.messages == [
        f"{shards}: 2 skipped (data.on_bad=skip), the first: {shards}/c.tar, sample 9 lacks .cls",
        f"skipped: {shards}/c.tar, sample 8 lacks an image",
    ]


def test_what_the_webdataset_library_writes_reads_as_it_reads_it(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(8):
            writer.write({"__key__": f"train/{i:05}", "png": picture(30 * i), "cls": 7 - i})
    found = sharded(tmp_path)
    theirs = webdataset.WebDataset(
        sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False, empty_check=False
    )
    pairs = list(theirs.decode("torchrgb8").to_tuple("png", "cls"))
    assert len(found) == len(pairs) == 8
    for (ours, label), (pixels, expected) in zip(found, pairs, strict=True):
        assert label == expected
        torch.testing.assert_close(ours, torch.full_like(ours, float(pixels[0, 0, 0]) / 127.5 - 1))


def test_a_label_outside_the_table_is_named(shards: Path) -> None:
    shard(shards / "c.tar", {"8": {"png": encoded(0), "cls": b"900000"}})
    message = (
        r"c\.tar, 8\.png has label 900000, the data set has 900001 classes; expected at most the model's 10"
    )
    with pytest.raises(DataError, match=message):
        check_fits(sharded(shards), SHAPE)
    shard(shards / "c.tar", {key: {"png": encoded(0), "cls": b"-1"} for key in "6789"})
    with pytest.raises(DataError, match=r"sample \d \(.*c\.tar, \d\.png\) has label -1; expected 0 to 9"):
        first_batch(sharded(shards), batch_size=7)


def test_a_label_outside_the_table_is_skipped_in_its_turn(shards: Path) -> None:
    shard(shards / "c.tar", {"8": {"png": encoded(0), "cls": b"900"}})
    found = sharded(shards, on_bad="skip")
    check_fits(found, SHAPE, skip_bad=True)
    assert found.num_classes == 901 and len(first_batch(found, on_bad="skip", batch_size=4)) == 4


def test_a_second_image_of_a_sample_is_named(shards: Path) -> None:
    shard(shards / "c.tar", {"8": {"png": encoded(0), "seg.png": encoded(1), "cls": b"1"}})
    with pytest.raises(
        DataError, match=r"c\.tar, sample 8 has the images 8\.png and 8\.seg\.png; expected one"
    ):
        sharded(shards)
    assert len(sharded(shards, on_bad="skip")) == 3


def test_a_bad_image_is_named_when_it_is_read(shards: Path) -> None:
    shard(shards / "c.tar", {"9": {"png": encoded(0)[:40], "cls": b"1"}})
    with pytest.raises(DataError, match=r"c\.tar, 9\.png cannot be read"):
        sharded(shards)[3]


def test_a_broken_shard_is_named_or_left_out(shards: Path) -> None:
    (shards / "c.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"c\.tar cannot be read"):
        sharded(shards)
    assert len(sharded(shards, on_bad="skip")) == 3


def test_a_folder_without_shards_or_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no shards; expected files \*\.tar"):
        sharded(tmp_path)
    shard(tmp_path / "a.tar", {})
    with pytest.raises(DataError, match="has no samples"):
        sharded(tmp_path)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"datasets is not installed; pip install datasets"):
        hub()


@pytest.mark.parametrize("name", ["hf_datasets", "webdataset"])
def test_a_missing_size_is_told(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"image_size is empty with data.name {name}"):
        make_dataset(DataConfig(name=name, path="somewhere"))


def damaged(path: Path, at: int, keep_rest: bool) -> None:
    """Overwrite a header of a shard, or cut the shard off within it."""
    content = path.read_bytes()
    rest = b"\xff" * tarfile.BLOCKSIZE + content[at + tarfile.BLOCKSIZE :]
    path.write_bytes(content[:at] + (rest if keep_rest else rest[:100]))


@pytest.mark.parametrize("keep_rest", [True, False])
@pytest.mark.parametrize("member", [1, 2, 3])
def test_a_shard_that_is_broken_after_its_first_header_is_told(
    shards: Path, member: int, keep_rest: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Python's tarfile takes such a header for the archive's end."""
    with tarfile.open(shards / "b.tar") as archive:
        at = archive.getmembers()[member].offset
    damaged(shards / "b.tar", at, keep_rest)
    with pytest.raises(DataError, match=rf"b\.tar cannot be read \(.* {at:,} bytes\); repair it"):
        sharded(shards)
    assert len(sharded(shards, on_bad="skip")) == 1 and "b.tar cannot be read" in caplog.text


def test_a_shard_cut_off_between_two_members_is_told(shards: Path) -> None:
    with tarfile.open(shards / "b.tar") as archive:
        at = archive.getmembers()[2].offset
    (shards / "b.tar").write_bytes((shards / "b.tar").read_bytes()[:at])
    with pytest.raises(DataError, match=rf"b\.tar cannot be read \(broken or cut off after {at:,} bytes\)"):
        sharded(shards)


def test_a_compressed_shard_is_told(shards: Path) -> None:
    """Images are read where the index says that they lie."""
    with tarfile.open(shards / "c.tar", "w:gz") as archive:
        add(archive, "9.png", encoded(0))
        add(archive, "9.cls", b"1")
    with pytest.raises(DataError, match=r"c\.tar cannot be read"):
        sharded(shards)


@pytest.mark.parametrize(("label", "shown"), [("cat", "'cat'"), (None, "None"), (1.5, "1.5")])
def test_labels_that_are_no_whole_numbers_are_named(datasets: Any, label: Any, shown: str) -> None:
    rows = [{"image": picture(0), "label": 1}, {"image": picture(0), "label": label}]
    datasets.load_from_disk = lambda path: Rows({"image": ImageFeature(), "label": Value()}, rows)
    for on_bad in ("raise", "skip"):
        with pytest.raises(
            DataError, match=f"saved, row 1 has {shown} in the column label; expected a whole"
        ):
            hub(on_bad=on_bad)
