from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core_builders import small_dit
from torch import nn

from dydit.adapters.dit import DiTAdapter
from dydit.adapters.registry import ADAPTERS, adapter_for, build_backbone
from dydit.dynamic.convert import convert
from dydit.dynamic.loading import load_dydit
from dydit.errors import ShapeError
from dydit.models.dit import DiT


def test_dit_and_its_subclasses_have_an_adapter() -> None:
    class Mine(DiT):
        pass

    assert isinstance(adapter_for(small_dit()), DiTAdapter)
    assert isinstance(adapter_for(Mine(sample_size=4, hidden_size=8, depth=1, num_heads=1)), DiTAdapter)


def test_a_converted_subclass_loads_again(tmp_path: Path) -> None:
    class Mine(DiT):
        pass

    model = convert(Mine(sample_size=4, hidden_size=8, depth=1, num_heads=1))
    model.save_pretrained(tmp_path)
    loaded = load_dydit(tmp_path)
    assert type(loaded.backbone) is DiT
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ShapeError, match=r"model of class Linear; expected one of DiT.*; write an adapter"):
        adapter_for(nn.Linear(1, 1))
    with pytest.raises(ShapeError, match=r"backbone of class 'Unet'; expected one of DiT"):
        build_backbone("Unet", {})


def test_build_backbone_makes_the_class_from_its_arguments() -> None:
    model = build_backbone("DiT", {"sample_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1})
    assert type(model) is DiT and model.shape.depth == 1
    assert "DiT" in ADAPTERS


def test_another_class_of_the_same_name_is_refused() -> None:
    other = type("DiT", (nn.Linear,), {"__module__": "models"})
    with pytest.raises(
        ShapeError, match=r"DiT of module models, not of dydit.models.dit; .*write an adapter"
    ):
        adapter_for(other(1, 1))
