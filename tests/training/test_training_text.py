"""Models that take text in place of a class train in the same loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_builders import TEXT, small_dit
from torch import Tensor

from dydit.config import RunConfig
from dydit.dynamic.convert import convert
from dydit.errors import DataError
from dydit.training import make_dataset, train

LENGTH, WIDTH = TEXT["context_length"], TEXT["context_dim"]


class Captions:
    """Sixteen images with text tokens; sample ``bad`` has tokens of another shape."""

    num_classes = 0
    sample_shape = (1, 8, 8)

    def __init__(self, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1
        self.text = torch.randn(16, LENGTH, WIDTH, generator=generator)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index], self.text[index, :1] if index == self.bad else self.text[index]


def dynamic_model(cfg: RunConfig) -> Any:
    return convert(small_dit(conditioning="adaln_single", in_channels=1), cfg.dydit)


def test_a_model_that_takes_text_is_finetuned_with_its_text_dropped(
    make_config: Callable[..., RunConfig],
) -> None:
    cfg = make_config(train={"steps": 3, "log_every": 1}, data={"class_dropout": 0.5, "flip": False})
    model = dynamic_model(cfg)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    before = [p.detach().clone() for p in model.router_parameters()]
    result = train(model, cfg, Captions())
    assert result.steps == 3 and torch.isfinite(torch.tensor(result.metrics["loss"]))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.router_parameters(), strict=True))
    dropped = torch.cat([(y == 0).all(dim=(1, 2)) for y in seen])  # its tokens of no text are zeros
    assert 0 < dropped.float().mean() < 1


def test_text_of_another_shape_is_named(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config(data={"batch_size": 16})
    with pytest.raises(DataError, match=rf"sample 3 has text of shape \(1, {WIDTH}\)"):
        train(dynamic_model(cfg), cfg, Captions(bad=3))


def test_classes_for_a_model_that_takes_text_are_refused(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config()
    with pytest.raises(DataError, match="10 classes; expected text tokens"):
        train(dynamic_model(cfg), cfg, make_dataset(cfg.data))
