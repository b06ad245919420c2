"""What is refused before training starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from dydit.config import RunConfig, Section
from dydit.dynamic.compute_loss import minimum_ratio
from dydit.dynamic.dydit import DyDiT
from dydit.errors import CheckpointError, ConfigError

# A run cannot go on from a checkpoint when one of these differs: the tensors or their meaning would not fit.
FIXED_SECTIONS = ("task", "seed", "model", "dydit", "objective")
SAMPLES = "samples"  # of the data set, in a checkpoint's state

log = logging.getLogger(__name__)


def check_model(model: Any, cfg: RunConfig) -> None:
    """Refuse a model that is not the one which the configuration describes.

    Raises:
        ConfigError: names what differs.
    """
    dynamic = isinstance(model, DyDiT)
    if dynamic != (cfg.task == "finetune"):
        raise ConfigError(
            f"a {type(model).__name__} for task {cfg.task}",
            expected="a DyDiT for finetune, a static model for pretrain",
            remedy="convert the model, or change task",
        )
    if dynamic and model.routing_config != cfg.dydit:
        saved, mine = model.routing_config.model_dump(mode="json"), cfg.dydit.model_dump(mode="json")
        raise ConfigError(
            f"the model was converted with {_first_change('dydit', saved, mine)}",
            remedy="give the run the model's own: cfg.dydit = model.routing_config",
        )


def check_target(model: Any, cfg: RunConfig) -> None:
    """Refuse a compute target that no routing reaches.

    Raises:
        ConfigError: names the lowest target that can be reached.
    """
    lowest = minimum_ratio(model.shape, model.routing_config)
    if cfg.compute.target < lowest:
        raise ConfigError(
            f"compute.target is {cfg.compute.target}",
            expected=f"at least {math.ceil(lowest * 1e4) / 1e4:.4f}, the least this model can spend",
            remedy="raise compute.target",
        )


def check_dropout(model: Any, cfg: RunConfig) -> None:
    """Refuse to drop labels of a model that has nothing to put in their place.

    Raises:
        ConfigError: says how to go on.
    """
    if cfg.data.class_dropout > 0 and model.null_label is None:
        raise ConfigError(
            f"data.class_dropout is {cfg.data.class_dropout} for a model without a null class",
            remedy="set data.class_dropout=0",
        )


def check_same_run(cfg: RunConfig, saved: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another model, objective or seed.

    Steps, rates, batch size and the like may change.

    Args:
        cfg: the run now.
        saved: the configuration in the checkpoint, as JSON values.

    Raises:
        CheckpointError: names the section that differs.
    """
    mine = cfg.model_dump(mode="json")
    for section in FIXED_SECTIONS:
        before = _with_defaults(getattr(cfg, section), saved[section])
        if mine[section] != before:
            change = _first_change(section, before, mine[section])
            raise CheckpointError(
                f"the checkpoint was made with {change}",
                remedy=f"set {section} back, or start in another output_dir",
            )


def check_same_data(cfg: RunConfig, samples: int, state: Mapping[str, Any]) -> None:
    """Refuse to go on with other data, in whose order the position of a checkpoint means nothing.

    Another path may be the same folder, moved: it is logged, as is another path of the teacher.

    Args:
        cfg: the run now.
        samples: of its data set.
        state: of the checkpoint; an old one does not know its number of samples.

    Raises:
        CheckpointError: names what differs.
    """
    saved = state["config"]
    before, mine = _with_defaults(cfg.data, saved["data"]), cfg.data.model_dump(mode="json")
    # No other data set draws its images from a seed.
    fixed = ("name", "seed") if cfg.data.name == "shapes" else ("name",)
    differing = next((key for key in fixed if before[key] != mine[key]), None)
    if differing is not None:
        change = _first_change(f"data.{differing}", before[differing], mine[differing])
    elif state.get(SAMPLES, samples) != samples:
        change = f"{state[SAMPLES]} samples of data, this run has {samples}"
    else:
        _warn_of_paths(cfg, before["path"], saved["backbone"])
        return
    raise CheckpointError(
        f"the checkpoint was made with {change}", remedy="set data back, or start in another output_dir"
    )


def _warn_of_paths(cfg: RunConfig, data: str | None, backbone: str | None) -> None:
    named = {"data.path": (data, cfg.data.path)}
    if cfg.warmup.mode == "distill" and cfg.warmup.steps > 0:  # else its weights come from the checkpoint
        named["backbone"] = (backbone, cfg.backbone)
    for key, (saved, mine) in named.items():
        if saved != mine:
            change = _first_change(key, saved, mine)
            log.warning("the checkpoint was made with %s: the results are the same if the files are", change)


def _with_defaults(section: Any, saved: Any) -> Any:
    """A saved section, and at its default what is new since: that means what was done before."""
    if not isinstance(section, Section) or not isinstance(saved, Mapping):
        return saved
    new = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(section).model_fields.items()
        if name not in saved and not field.is_required()
    }
    return {**saved, **new}


def _first_change(key: str, saved: Any, mine: Any) -> str:
    if isinstance(saved, dict) and isinstance(mine, dict):
        inner = next(name for name in {**saved, **mine} if saved.get(name) != mine.get(name))
        return _first_change(f"{key}.{inner}", saved.get(inner), mine.get(inner))
    return f"{key}={saved}, this run has {key}={mine}"
