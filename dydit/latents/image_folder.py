"""Images in one folder per class: which there are, and how one of them becomes a square tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dydit.errors import DataError
from dydit.latents.bad_data import LABEL_LIMIT, OnBad

# torchvision's list, so that a folder means the same here and there.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CLASS_MAP = "classes.json"
HALF_RANGE = 127.5  # bytes are 0..255, so value / 127.5 - 1 lies in [-1, 1]


class ImageFile(NamedTuple):
    """An image by its path below the folder, with forward slashes, and its class."""

    name: str
    label: int


@dataclass(frozen=True)
class Skipped:
    """A file or class folder that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds, in an order that depends on the names alone.

    Args:
        root: the folder.
        classes: class folder -> label.
        files: images by class folder, then by path.
        skipped: class folders without images, and images outside of a class.
        ignored: files that are no images by their ending.
    """

    root: Path
    classes: dict[str, int]
    files: tuple[ImageFile, ...]
    skipped: tuple[Skipped, ...] = ()
    ignored: int = 0

    @property
    def num_classes(self) -> int:
        """Rows that a table of labels needs."""
        return max(self.classes.values()) + 1


def scan_images(root: str | Path, on_bad: OnBad = "raise") -> ImageFolder:
    """List the images below ``root``, without opening them.

    As torchvision's ``ImageFolder``: every folder in ``root`` is a class, labelled 0, 1, … in order of name,
    and holds images at any depth. A file ``classes.json`` in ``root`` (``{"cat": 3, "dog": 7}``) gives the
    labels instead. Unlike there, names that begin with a dot are passed over (``.ipynb_checkpoints`` is no
    class), and files that are no images by their ending are counted.

    Args:
        root: the folder.
        on_bad: ``raise`` at a class without images, a folder that the class map lacks, an image in no class
            or an unreadable folder; or ``skip`` them, which lists them in the result.

    Raises:
        DataError: there are no images, the class map is broken, or ``on_bad`` is raise and something is bad.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder", expected="a folder with one folder of images per class")
    try:
        here = {entry.name: entry.is_dir() for entry in os.scandir(root) if not entry.name.startswith(".")}
    except OSError as problem:
        raise DataError(f"{root} cannot be read ({problem.strerror})") from problem
    found, loose = (sorted(name for name in here if here[name] is wanted) for wanted in (True, False))
    classes = _class_map(root, found)
    files: list[ImageFile] = []
    skipped = [Skipped(name, f"is not in {CLASS_MAP}") for name in found if name not in classes]
    skipped += [Skipped(name, "lies in no class folder") for name in loose if _is_image(name)]
    ignored = sum(not _is_image(name) for name in loose if name != CLASS_MAP)
    for name, label in sorted(classes.items()):
        names = list(_walk(root, name, skipped))
        images = [path for path in names if _is_image(path)]
        files += [ImageFile(path, label) for path in images]
        ignored += len(names) - len(images)
        if not images:
            skipped.append(Skipped(name, "has no images"))
    if skipped and on_bad == "raise":
        raise DataError(
            f"{root / skipped[0].name} {skipped[0].reason}", remedy="put it right, or set on_bad to skip"
        )
    if not files:
        raise DataError(f"no images in the class folders of {root}", expected=f"files {_list(IMAGE_ENDINGS)}")
    return ImageFolder(root, classes, tuple(files), tuple(skipped), ignored)


def load_image(path: str | Path, size: int) -> Tensor:
    """Read an image as bytes (3, size, size), reduced and cropped by ``centre_crop``.

    Transparency and the orientation that a camera noted are not applied, as in ADM and torchvision.

    Raises:
        DataError: it is missing, truncated, no image, or of more than 8 bits per channel; names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # conversion would clip, and leave a white square
                raise ValueError(f"mode {image.mode}, more than 8 bits per channel")
            pixels = np.array(centre_crop(image.convert("RGB"), size))
    except Exception as problem:  # Pillow's decoders raise whatever broken bytes lead them to
        reason = " ".join((getattr(problem, "strerror", None) or str(problem)).split())
        reason = reason.replace(f" {str(path)!r}", "")  # said before it, and in a manifest not wanted
        raise DataError(f"{path} cannot be read ({reason or type(problem).__name__})") from problem
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, size × size pixels, as ADM and DiT prepare ImageNet (Dhariwal & Nichol).

    Halved by averaging as long as the shorter side stays at least ``size``, brought to ``size`` by bicubic
    interpolation, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_signed(pixels: Tensor) -> Tensor:
    """Bytes of any shape as float32 in [−1, 1]."""
    return pixels.float() / HALF_RANGE - 1


class FolderImages:
    """The images of a folder as training samples: item i is ((3, size, size) float32 in [−1, 1], label).

    Args:
        folder: what ``scan_images`` found.
        size: side of the samples in pixels.

    Raises:
        DataError: from ``[]``, for a file that cannot be read.
    """

    def __init__(self, folder: ImageFolder, size: int) -> None:
        self.folder, self.size = folder, size
        self.labels = [file.label for file in folder.files]
        self.num_classes = folder.num_classes
        self.sample_shape = (3, size, size)

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_signed(load_image(self.file_of(index), self.size)), self.labels[index]

    def file_of(self, index: int) -> str:
        """The file of item ``index``."""
        return str(self.folder.root / self.folder.files[index].name)


def _walk(root: Path, name: str, skipped: list[Skipped]) -> Iterator[str]:
    """Files below a class folder, as paths from ``root`` in torchvision's order; adds to ``skipped``."""

    def unreadable(problem: OSError) -> None:
        place = Path(problem.filename or root / name).relative_to(root).as_posix()
        skipped.append(Skipped(place, f"cannot be read ({problem.strerror})"))

    if not (root / name).is_dir():
        return  # a class of the map without a folder has no images
    for folder, _, files in sorted(os.walk(root / name, followlinks=True, onerror=unreadable)):
        relative = Path(folder).relative_to(root)
        if not any(part.startswith(".") for part in relative.parts):
            yield from (f"{relative.as_posix()}/{file}" for file in sorted(files) if file[0] != ".")


def _class_map(root: Path, found: list[str]) -> dict[str, int]:
    """Class folder -> label, from the class map or by order.

    Raises:
        DataError: the class map is broken, or there is neither one nor any folder.
    """
    path = root / CLASS_MAP
    if not path.is_file():
        if not found:
            raise DataError(f"{root} has no class folders", expected="one folder of images per class")
        return {name: label for label, name in enumerate(found)}
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"{path} is not JSON ({problem})") from problem
    if not isinstance(classes, dict) or not classes:
        raise DataError(f"{path} is no class map", expected='a mapping such as {"cat": 0, "dog": 1}')
    for name, label in classes.items():
        if Path(name).name != name or name.startswith("."):
            raise DataError(f"{path} names {name!r}", expected=f"a folder in {root}")
        if type(label) is not int or not 0 <= label < LABEL_LIMIT:  # a bool is an int too
            raise DataError(
                f"{path} gives {name} the label {label!r}",
                expected=f"a whole number from 0 to {LABEL_LIMIT - 1:,}",
            )
    return classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _list(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]
