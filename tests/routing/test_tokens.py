"""Capacity mode's choice of tokens: as many as asked for, the highest scores, of equal ones the first."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.routing.tokens import top_gates, top_tokens

ROWS = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        # Few distinct values, so that most rows hold ties.
        st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@given(rows=ROWS, data=st.data())
def test_the_highest_scores_first_and_of_equal_ones_the_first(
    rows: list[list[float]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(rows[0])))
    chosen = top_tokens(torch.tensor(rows), k)
    assert chosen.shape == (len(rows), k)
    for row, positions in zip(rows, chosen.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        assert positions == sorted(ranked[:k])


@given(rows=ROWS, data=st.data())
def test_gates_are_open_at_those_tokens_alone(rows: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(rows[0])))
    logits = torch.tensor(rows)
    gates = top_gates(logits, k)
    assert gates.shape == logits.shape and gates.dtype == logits.dtype
    assert gates.sum(1).tolist() == [k] * len(rows)
    assert torch.equal(gates.nonzero()[:, 1].view(len(rows), k), top_tokens(logits, k))


def test_gates_keep_the_dtype() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.bfloat16)
    assert top_gates(logits, 2).tolist() == [[1.0, 0.0, 1.0]]
    assert top_gates(logits, 2).dtype == torch.bfloat16


def test_a_long_row_of_equal_scores_keeps_its_first_tokens() -> None:
    """An unstable sort keeps the order of short rows by luck."""
    assert top_tokens(torch.zeros(2, 5000), 1234).tolist() == [list(range(1234))] * 2
