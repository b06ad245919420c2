"""Fine-tuning on other classes: a label table of another size."""

from __future__ import annotations

import logging

import torch
from accelerate import init_empty_weights

from dydit.errors import CheckpointError
from dydit.models.dit import DiT

LABEL_TABLE = "y_embedder.embedding_table.weight"
MISMATCH_CHOICES = ("error", "drop")

logger = logging.getLogger(__name__)


def with_classes(model: DiT, num_classes: int, on_class_mismatch: str) -> DiT:
    """The model for ``num_classes`` classes: itself if it has as many.

    Args:
        model: a DiT conditioned on labels; its other weights are shared with the result.
        num_classes: classes without the null class.
        on_class_mismatch: where the model has another number of them, ``error`` refuses, ``drop`` gives
            every class a fresh row, N(0, 0.02²). The null class keeps its row: it stands for no class in
            particular, and guidance starts from it.

    Raises:
        CheckpointError: the numbers differ and are not to, or the model is conditioned on text.
    """
    if on_class_mismatch not in MISMATCH_CHOICES:
        raise CheckpointError(
            f"on_class_mismatch is {on_class_mismatch!r}", expected=" or ".join(map(repr, MISMATCH_CHOICES))
        )
    found = model.shape.num_classes
    if num_classes == found:
        return model
    state = model.state_dict()
    if LABEL_TABLE not in state:
        raise CheckpointError(f"{num_classes} classes asked of a model that is conditioned on text")
    if on_class_mismatch == "error" or num_classes < 1:
        raise CheckpointError(
            f"the checkpoint has {found} classes",
            expected=f"{num_classes}",
            remedy="ask for as many, or pass on_class_mismatch='drop' to start with a fresh label table",
        )
    stored = state[LABEL_TABLE]
    fresh = torch.empty(num_classes, stored.shape[1]).normal_(std=0.02).to(stored)
    kept = "only the null class's row is kept" if model.shape.null_class else "nothing is kept"
    logger.warning(
        "label table of %d classes dropped: %d fresh rows, untrained; %s", found, num_classes, kept
    )
    with init_empty_weights():
        resized = DiT(**{**_arguments(model), "num_classes": num_classes})
    resized.load_state_dict({**state, LABEL_TABLE: torch.cat([fresh, stored[found:]])}, assign=True)
    return resized.train(model.training)


def _arguments(model: DiT) -> dict[str, object]:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}
