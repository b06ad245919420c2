"""The published model sizes (Peebles & Xie 2023, table 1) by name: DiT-{S,B,L,XL}/{2,4,8}."""

from __future__ import annotations

import re
from difflib import get_close_matches

from dydit.errors import ConfigError

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)

# GMACs of one forward of a 256 px image (latent 4 × 32 × 32) in the paper, which leaves small terms out.
PAPER_GMACS = {
    "DiT-S/2": 6.06, "DiT-S/4": 1.41, "DiT-S/8": 0.36,
    "DiT-B/2": 23.01, "DiT-B/4": 5.56, "DiT-B/8": 1.42,
    "DiT-XL/2": 118.64, "DiT-XL/4": 29.05, "DiT-XL/8": 7.39,
}  # fmt: skip
PRESETS = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)


def preset_arguments(name: str) -> dict[str, int]:
    """Keyword arguments of ``DiT`` for a preset name.

    Raises:
        ConfigError: there is no such preset; names the nearest one.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown preset {name!r}",
            expected="one of " + ", ".join(PRESETS),
            remedy=f"did you mean {near[0]!r}?",
        )
    match = re.fullmatch(r"DiT-(\w+)/(\d)", name)
    assert match is not None
    return {**SIZES[match[1]], "patch_size": int(match[2])}
