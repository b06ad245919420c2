"""Data sets, the checks on their samples, and the resumable order."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.shapes import ModelShape
from dydit.training.data import check_fits, make_dataset
from dydit.training.order import ResumableBatches, epoch_order
from dydit.training.samples import batches

SHAPE = ModelShape(
    sample_size=(8, 8), patch_size=2, in_channels=1, out_channels=2, hidden_size=32, depth=2, num_heads=4,
    mlp_hidden=128, mlp_groups=4, num_classes=10,
)  # fmt: skip


class Samples:
    """Twelve constant images; the sample at ``bad`` is what a test makes of it."""

    num_classes = 10
    sample_shape = (1, 8, 8)

    def __init__(self, bad: int | None = None, sample: Any = None) -> None:
        self.bad, self.sample = bad, sample

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.bad:
            if isinstance(self.sample, Exception):
                raise self.sample
            return self.sample
        return torch.full((1, 8, 8), index / 12), index % 10


class NamedSamples(Samples):
    """Their files are known."""

    def file_of(self, index: int) -> str:
        return f"cat/{index}.png"


def take(dataset: Any, count: int, **data: Any) -> list[Any]:
    config = DataConfig(**{"batch_size": 4, **data})
    return list(itertools.islice(batches(dataset, config, SHAPE, seed=0), count))


def test_digits_are_in_range_and_fit_their_model() -> None:
    digits = make_dataset(DataConfig())
    check_fits(digits, SHAPE)
    images = torch.stack([digits[i][0] for i in range(len(digits))])
    assert len(digits) == 1797 and images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert {digits[i][1] for i in range(len(digits))} == set(range(10))


def test_digits_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size is 16"):
        make_dataset(DataConfig(image_size=16))


def test_each_epoch_visits_every_sample_once_in_another_order() -> None:
    sampler = iter(ResumableBatches(12, seed=0, batch=5))
    stream = [visit for batch in itertools.islice(sampler, 12) for visit in batch]  # 60 = 5 epochs
    assert [visit.epoch for visit in stream] == [number // 12 for number in range(60)]
    epochs = [[visit.sample for visit in stream[i : i + 12]] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[2] == epoch_order(12, 0, 2).tolist()


@pytest.mark.parametrize("position", [0, 5, 10, 15, 35])
def test_the_order_continues_from_any_position(position: int) -> None:
    straight = list(itertools.islice(ResumableBatches(12, seed=3, batch=5), 10))
    resumed = ResumableBatches(12, seed=3, batch=5, position=position)
    assert list(itertools.islice(resumed, 3)) == straight[position // 5 : position // 5 + 3]


def test_processes_share_a_batch_between_them() -> None:
    whole = next(iter(ResumableBatches(12, seed=1, batch=6)))
    parts = [next(iter(ResumableBatches(12, seed=1, batch=3, rank=rank, world=2))) for rank in range(2)]
    assert parts == [whole[0::2], whole[1::2]]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.zeros(1, 8, 8), 10), "sample 7 has label 10; expected 0 to 9"),
        ((torch.zeros(1, 8, 8), -1), "sample 7 has label -1"),
        ((torch.zeros(3, 8, 8), 1), r"sample 7 has shape \(3, 8, 8\)"),
        ((torch.full((1, 8, 8), torch.nan), 1), "sample 7 has values that are not finite"),
        (OSError("image file is truncated"), "sample 7 cannot be read: image file is truncated"),
        (SyntaxError("broken PNG"), r"sample 7 cannot be read: SyntaxError\('broken PNG'\)"),
        (struct.error("too short"), r"sample 7 cannot be read: error\('too short'\)"),
        (Image.DecompressionBombError("huge"), r"sample 7 cannot be read: DecompressionBombError\('huge'\)"),
    ],
)
def test_a_bad_sample_is_named_or_skipped(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        take(Samples(7, sample), 3)
    images = torch.cat([batch.images for batch in take(Samples(7, sample), 3, on_bad="skip")])
    assert sorted((images[:, 0, 0, 0] * 12).round().int().tolist()) == [0, 1, 2, 3, 4, 5, 6, 8, 8, 9, 10, 11]


def test_a_bad_sample_is_named_by_its_file() -> None:
    with pytest.raises(DataError, match=r"sample 7 \(cat/7\.png\) has label 10; expected 0 to 9; repair it"):
        take(NamedSamples(7, (torch.zeros(1, 8, 8), 10)), 3)
    with pytest.raises(DataError, match=r"sample 7 \(cat/7\.png\) cannot be read: truncated; repair it"):
        take(NamedSamples(7, OSError("truncated")), 3)
    with pytest.raises(DataError, match=r"sample 7 cannot be read: cat/7\.png is no image; repair it"):
        take(NamedSamples(7, DataError("cat/7.png is no image")), 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_skipped_sample_is_logged_once(caplog: pytest.LogCaptureFixture, num_workers: int) -> None:
    bad = NamedSamples(7, (torch.zeros(1, 8, 8), 10))
    take(bad, 9, on_bad="skip", num_workers=num_workers)  # three epochs
    assert caplog.messages == ["skipped: sample 7 (cat/7.png) has label 10; expected 0 to 9"]


def test_what_an_image_folder_leaves_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    data = {"name": "image_folder", "path": str(tmp_path), "image_size": 8}
    make_dataset(DataConfig(**data, on_bad="skip"))
    assert caplog.messages == [
        f"{tmp_path}: 2 skipped (data.on_bad=skip), the first: {tmp_path}/dog has no images",
        f"skipped: {tmp_path}/eel has no images",
    ]


def test_loader_processes_give_the_same_batches_and_the_same_error() -> None:
    for alone, helped in zip(take(Samples(), 4), take(Samples(), 4, num_workers=1), strict=True):
        assert torch.equal(alone.images, helped.images) and torch.equal(alone.labels, helped.labels)
    with pytest.raises(DataError, match=r"^sample 7 has label 11; expected 0 to 9; repair"):
        take(Samples(7, (torch.zeros(1, 8, 8), 11)), 3, num_workers=1)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    take(Samples(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_that_does_not_fit_the_model_is_refused() -> None:
    other = Samples()
    other.sample_shape = (3, 8, 8)
    with pytest.raises(DataError, match=r"images are \(3, 8, 8\); expected the model's \(1, 8, 8\)"):
        check_fits(other, SHAPE)
    other = Samples()
    other.num_classes = 11
    with pytest.raises(DataError, match="11 classes; expected at most the model's 10"):
        check_fits(other, SHAPE)


def test_the_sample_that_gives_too_many_classes_is_named() -> None:
    class Stray(NamedSamples):
        labels, num_classes = (3, 900, 9), 901

    message = r"^cat/1\.png has label 900, the data set has 901 classes; expected at most the model's 10; set"
    with pytest.raises(DataError, match=message):
        check_fits(Stray(), SHAPE)
