"""What each of a schedule's masks leaves on of a block's layers: runs of rows or columns, for the loader."""

from __future__ import annotations

from typing import Any

import numpy as np

from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule, is_one_run


def is_fused(model: DyDiT) -> bool:
    """Whether its blocks have q, k and v in one layer, not in three."""
    block = model.adapter.blocks(model.backbone)[0]
    return len(model.adapter.attention(block).qkv) == 1


def runs_of(mask: np.ndarray, size: int) -> list[list[int]]:
    """[first, count] of each run of components of ``size`` rows; one empty run where none is on."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [[int(first) * size, int(last - first) * size] for first, last in edges] or [[0, 0]]


def attention_program(heads: np.ndarray, fused: bool) -> str:
    """The stage that runs a head mask (H,), of a model that has q, k and v in one layer or in three."""
    on, H = int(heads.sum()), len(heads)
    if on < 2:
        return "attend_of_one_head" if on else "attend_without_heads"
    return "attend_of_run" if fused and on < H and is_one_run(heads[None])[0] else "attend"


def mask_slices(schedule: SubnetSchedule, model: DyDiT) -> list[dict[str, Any]]:
    """Of each of the schedule's masks: the stages to run, and what to cut of the layers that they take.

    A cut is [layer, 0 for rows or 1 for columns, runs of them]: for q, k and v three views of a fused layer,
    where the heads are one run, else one copy. Without heads there are none of q, k and v, without groups
    none of fc1.
    """
    shape, fused = model.shape, is_fused(model)
    H, d = shape.num_heads, shape.head_dim
    slices = []
    for heads, groups in zip(schedule.head_rows, schedule.group_rows, strict=True):
        of_heads, of_groups = runs_of(heads, d), runs_of(groups, shape.group_size)
        program = attention_program(heads, fused)
        if fused and program == "attend":
            qkv = [["qkv0", 0, runs_of(np.tile(heads, 3), d)]]
        elif fused:
            starts = [part * H * d for part in range(3)]
            qkv = [["qkv0", 0, [[start + first, count] for first, count in of_heads]] for start in starts]
        else:
            qkv = [[f"qkv{part}", 0, of_heads] for part in range(3)]
        suffix = "" if groups.any() else "_without_groups"
        slices.append(
            {
                "attend": program,
                "mlp_of_all": f"mlp_of_all{suffix}",
                "mlp_of_kept": f"mlp_of_kept{suffix}",
                "attention": [*(qkv if heads.any() else []), ["out", 1, of_heads]],
                "mlp": [*([["fc1", 0, of_groups]] if groups.any() else []), ["fc2", 1, of_groups]],
            }
        )
    return slices
