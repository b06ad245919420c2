"""Which rows, columns and programs a mask comes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dydit.deployment.slices import attention_program, runs_of


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(1, 5))
def test_runs_are_the_rows_of_the_components_that_are_on(mask: list[bool], size: int) -> None:
    runs = runs_of(np.array(mask), size)
    rows = [row for first, count in runs for row in range(first, first + count)]
    assert rows == np.flatnonzero(np.repeat(mask, size)).tolist()
    ends = [first + count for first, count in runs]
    assert all(end < first for end, (first, _) in zip(ends[:-1], runs[1:], strict=True))  # none adjoin
    assert all(count > 0 for _, count in runs) or runs == [[0, 0]]


@pytest.mark.parametrize(
    ("heads", "fused", "separate"),
    [
        ("0000", "attend_without_heads", "attend_without_heads"),
        ("0010", "attend_of_one_head", "attend_of_one_head"),
        ("0110", "attend_of_run", "attend"),
        ("1010", "attend", "attend"),
        ("1111", "attend", "attend"),
        ("1", "attend_of_one_head", "attend_of_one_head"),
    ],
)
def test_the_program_of_a_head_mask(heads: str, fused: str, separate: str) -> None:
    mask = np.array([head == "1" for head in heads])
    assert attention_program(mask, fused=True) == fused
    assert attention_program(mask, fused=False) == separate
