"""``webdataset``: images in tar shards, in that library's layout, read by index.

The library itself reads shards as a stream, in which a run could not be resumed at a position, nor an order
be shared with another number of processes. A tar file tells where its members lie, so one pass over the
headers gives an index, and the library is not needed.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dydit.config import DataConfig
from dydit.errors import DataError
from dydit.latents.bad_data import LABEL_LIMIT, OnBad, log_skipped
from dydit.latents.image_folder import IMAGE_ENDINGS
from dydit.training.hub_images import pixel_side, square

LABEL_ENDING = ".cls"


class ShardSample(NamedTuple):
    """Where an image lies: shard, its name there, offset and size in bytes; and its label."""

    shard: Path
    name: str
    offset: int
    size: int
    label: int


class ShardedImages:
    """Images of tar shards: item i is ((3, side, side) float32 in [-1, 1], label).

    A sample is an image and a ``.cls`` file, a number, whose names are the same up to the first dot.

    Args:
        path: a folder of shards ``*.tar``; their order is that of their names.
        side: of the samples in pixels.
        on_bad: ``raise`` at a shard that is broken, a sample without image or label, or a label that is not
            below ``LABEL_LIMIT``; or ``skip`` them, which logs each.

    Raises:
        DataError: there are no shards or no samples, or ``on_bad`` is raise and something is bad; from
            ``[]``, for an image that cannot be read.
    """

    def __init__(self, path: str | Path, side: int, on_bad: OnBad = "raise") -> None:
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise DataError(f"{path} has no shards", expected="files *.tar")
        self.samples: list[ShardSample] = []
        skipped: list[str] = []
        for shard in tqdm(shards, desc="reading shards", unit="shard", disable=None, delay=1):
            for found in read_index(shard):
                if isinstance(found, ShardSample):
                    self.samples.append(found)
                elif on_bad == "raise":
                    raise DataError(str(found), remedy="repair it, or set data.on_bad=skip")
                else:
                    skipped.append(str(found))
        log_skipped(path, skipped)
        if not self.samples:
            raise DataError(
                f"{path} has no samples", expected=f"images with {LABEL_ENDING} files in its shards"
            )
        self.labels = [sample.label for sample in self.samples]
        self.num_classes = 1 + max(self.labels)
        self.side, self.sample_shape = side, (3, side, side)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        try:
            with sample.shard.open("rb") as file:
                file.seek(sample.offset)
                content = file.read(sample.size)
            return square(Image.open(io.BytesIO(content)), self.side), sample.label
        except Exception as problem:  # Pillow's decoders raise whatever broken bytes lead them to
            raise DataError(f"{self.file_of(index)} cannot be read ({problem})") from problem

    def file_of(self, index: int) -> str:
        """The shard of item ``index``, and the image's name there."""
        sample = self.samples[index]
        return f"{sample.shard}, {sample.name}"


def sharded_images(config: DataConfig) -> ShardedImages:
    """``data.name: webdataset``."""
    return ShardedImages(str(config.path), pixel_side(config), config.on_bad)


def read_index(shard: Path) -> Iterator[ShardSample | DataError]:
    """The samples of one shard, and an error in the place of each bad one."""
    images: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as archive:  # not compressed: images are read at their offsets
            for member in archive:
                key = _key(member.name)
                if member.isfile() and member.name.lower().endswith(IMAGE_ENDINGS):
                    images.setdefault(key, []).append(member)
                elif member.isfile() and member.name.endswith(LABEL_ENDING):
                    content = archive.extractfile(member)
                    labels[key] = content.read() if content else b""
            _check_end(shard, archive.offset)
    except (OSError, tarfile.TarError) as problem:
        yield DataError(f"{shard} cannot be read ({problem})")
        return
    for key in dict.fromkeys([*images, *labels]):
        yield _sample(shard, key, images.get(key, []), labels.get(key))


def _check_end(shard: Path, offset: int) -> None:
    """Refuse a shard whose members, which end ``offset`` bytes in, are not followed by an archive's end.

    ``tarfile`` takes a broken header, unless it is the first, for that end.

    Raises:
        tarfile.ReadError: members may be missing.
    """
    with shard.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"broken or cut off after {offset:,} bytes")


def _sample(
    shard: Path, key: str, images: list[tarfile.TarInfo], label: bytes | None
) -> ShardSample | DataError:
    if not images or label is None:
        return DataError(f"{shard}, sample {key} lacks {LABEL_ENDING if images else 'an image'}")
    if len(images) > 1:
        names = " and ".join(image.name for image in images)
        return DataError(f"{shard}, sample {key} has the images {names}", expected="one")
    (image,) = images
    with suppress(ValueError):
        if (number := int(label)) < LABEL_LIMIT:
            return ShardSample(shard, image.name, image.offset_data, image.size, number)
    return DataError(
        f"{shard}, sample {key} has the label {label[:20]!r}",
        expected=f"a whole number below {LABEL_LIMIT:,}",
    )


def _key(name: str) -> str:
    """A member's name without its endings: everything up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
