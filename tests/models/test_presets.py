from __future__ import annotations

import pytest
import torch

from dydit.errors import ConfigError
from dydit.models.dit import DiT
from dydit.models.presets import PRESETS, preset_arguments


@pytest.mark.parametrize(
    ("name", "depth", "hidden_size", "num_heads", "patch_size"),
    [
        ("DiT-S/8", 12, 384, 6, 8),
        ("DiT-B/4", 12, 768, 12, 4),
        ("DiT-L/2", 24, 1024, 16, 2),
        ("DiT-XL/2", 28, 1152, 16, 2),
    ],
)
def test_published_sizes(name: str, depth: int, hidden_size: int, num_heads: int, patch_size: int) -> None:
    with torch.device("meta"):
        shape = DiT.from_preset(name, sample_size=32, num_classes=1000).shape
    assert (shape.depth, shape.hidden_size, shape.num_heads) == (depth, hidden_size, num_heads)
    assert (shape.patch_size, shape.mlp_hidden, shape.out_channels) == (patch_size, 4 * hidden_size, 8)


def test_parameter_counts_are_the_papers() -> None:
    """Peebles & Xie, table 1: 33 M, 130 M, 458 M and 675 M."""
    for name, millions in (("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)):
        with torch.device("meta"):
            model = DiT.from_preset(f"DiT-{name}")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_overrides_win() -> None:
    model = DiT.from_preset("DiT-S/8", sample_size=(8, 16), depth=1, hidden_size=32, num_heads=2)
    assert (model.shape.depth, model.shape.grid) == (1, (1, 2))
    assert model.config["depth"] == 1


def test_there_are_twelve_presets() -> None:
    assert len(PRESETS) == 12 and all(preset_arguments(name) for name in PRESETS)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'DiT-XL-2'; expected one of .*'DiT-XL/2'\?"):
        DiT.from_preset("DiT-XL-2")
