"""``data.image_size`` where it is empty: the size of the model that is trained."""

from __future__ import annotations

from dydit.config import RunConfig
from dydit.errors import ConfigError
from dydit.models.loading import stored_sample_size

# Data sets that give images of any size; the others have a size of their own.
SIZED = ("image_folder", "shapes", "hf_datasets", "webdataset")


def with_image_size(cfg: RunConfig) -> RunConfig:
    """The run with ``data.image_size`` filled in from its model; as it is where it is set or of no use.

    Reads no more of a backbone than its sizes.

    Raises:
        ConfigError: the model's input is no square, and images are.
        CheckpointError: the backbone cannot be read.
    """
    if cfg.data.name not in SIZED or cfg.data.image_size is not None:
        return cfg
    size = model_size(cfg)
    if size[0] != size[1]:
        raise ConfigError(
            f"data.image_size is empty for a model of {size[0]} × {size[1]}",
            expected=f"a square, which images of data.name {cfg.data.name} become",
        )
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"image_size": size[0]})})


def model_size(cfg: RunConfig) -> tuple[int, int]:
    """Height and width of what the run's model takes, before the model is built."""
    if cfg.model is None:
        return stored_sample_size(str(cfg.backbone))
    size = cfg.model.sample_size
    return (size, size) if isinstance(size, int) else size
