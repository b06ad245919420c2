"""Listing images by class, and making squares of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_builders import image_folder, save_image
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from dydit.config import DataConfig
from dydit.errors import ConfigError, DataError
from dydit.latents.image_folder import centre_crop, load_image, scan_images, to_signed
from dydit.training.data import make_dataset


def test_a_folder_means_what_it_means_to_torchvision(images: Path) -> None:
    save_image(images / "ant" / "B.PNG", 7)
    save_image(images / "cat" / "a" / "x.jpg", 8)
    theirs = TorchvisionFolder(str(images))
    ours = scan_images(images)
    assert ours.classes == theirs.class_to_idx
    assert [(str(images / file.name), file.label) for file in ours.files] == theirs.samples
    assert (ours.num_classes, ours.skipped, ours.ignored) == (3, (), 0)


def test_a_class_map_gives_the_labels(images: Path) -> None:
    (images / "classes.json").write_text(json.dumps({"dog": 2, "cat": 9}))
    folder = scan_images(images)
    assert {file.name.split("/")[0]: file.label for file in folder.files} == {"cat": 9, "dog": 2}
    assert folder.num_classes == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no class map"),
        ("{}", "is no class map"),
        ('{"cat": "1", "dog": 0}', "gives cat the label '1'; expected a whole number"),
        ('{"cat": true, "dog": 0}', "gives cat the label True"),
        ('{"cat": -1, "dog": 0}', "gives cat the label -1"),
        (
            '{"cat": 1000000, "dog": 0}',
            "gives cat the label 1000000; expected a whole number from 0 to 999,999",
        ),
        ('{"../cat": 1, "dog": 0}', "names '../cat'; expected a folder in"),
        ('{"cat": 0}', "dog is not in classes.json"),
        ('{"cat": 0, "dog": 1, "emu": 2}', "emu has no images"),
    ],
)
def test_a_wrong_class_map_is_refused(images: Path, text: str, message: str) -> None:
    (images / "classes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        scan_images(images)


def test_what_is_bad_is_named_or_listed(images: Path) -> None:
    (images / "emu").mkdir()
    save_image(images / "stray.png", 1)
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        scan_images(images)
    (images / "cat" / "notes.txt").write_text("nice cats")
    folder = scan_images(images, "skip")
    assert [(skipped.name, skipped.reason) for skipped in folder.skipped] == [
        ("stray.png", "lies in no class folder"),
        ("emu", "has no images"),
    ]
    # An empty class keeps its label: the others' must not depend on it.
    assert (folder.classes, folder.ignored, len(folder.files)) == ({"cat": 0, "dog": 1, "emu": 2}, 1, 7)


def test_hidden_names_are_passed_over(images: Path) -> None:
    save_image(images / ".ipynb_checkpoints" / "00.png", 1)
    save_image(images / "cat" / ".thumbnails" / "00.png", 1)
    (images / "cat" / "._00.png").write_bytes(b"resource fork")
    assert len(scan_images(images).files) == 7


def test_an_unreadable_folder_is_not_taken_for_an_empty_one(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"dog/deep cannot be read \(Permission denied\)"):
        scan_images(images)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        scan_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no class folders"):
        scan_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images in the class folders"):
        scan_images(tmp_path, "skip")


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 24))
def test_every_image_becomes_a_square(width: int, height: int, size: int) -> None:
    assert centre_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_the_middle_is_kept_and_halving_averages() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 8)) == 200).all()
    board = np.indices((32, 32)).sum(0) % 2 * 255  # plain bicubic from 32 to 8 gives an uneven grey
    grey = np.asarray(centre_crop(Image.fromarray(board.astype(np.uint8)), 8))
    assert grey.min() == grey.max() and 127 <= grey[0, 0] <= 128


def test_an_image_of_the_right_size_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png", 16).permute(1, 2, 0).numpy(), pixels)
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_of_8_bits_becomes_colour(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    save_image(name, 0, mode=mode)
    assert load_image(name, 8).shape == (3, 8, 8)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png cannot be read \(mode I;16, more than 8 bits"):
        load_image(tmp_path / "deep.png", 8)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png cannot be read \(cannot identify image file\)"):
        load_image(tmp_path / "text.png", 8)
    with pytest.raises(DataError, match=r"none\.png cannot be read \(No such file"):
        load_image(tmp_path / "none.png", 8)


@given(position=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.booleans())
def test_broken_bytes_lead_to_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.png"
    save_image(path, 3)
    data = bytearray(path.read_bytes())
    position %= len(data)
    path.write_bytes(data[:position] if cut else data[:position] + bytes([byte]) + data[position + 1 :])
    try:
        assert load_image(path, 8).shape == (3, 8, 8)
    except DataError as problem:
        assert "broken.png cannot be read (" in str(problem)


def test_images_as_a_training_set(tmp_path: Path) -> None:
    images = image_folder(tmp_path)
    dataset = make_dataset(DataConfig(name="image_folder", path=str(images), image_size=8))
    assert (len(dataset), dataset.num_classes, dataset.sample_shape) == (7, 2, (3, 8, 8))
    image, label = dataset[6]
    assert image.dtype == torch.float32 and image.abs().max() <= 1 and label == 1
    with pytest.raises(ConfigError, match=r"data\.image_size is empty"):
        make_dataset(DataConfig(name="image_folder", path=str(images)))
