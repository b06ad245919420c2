from __future__ import annotations

from dydit.compute.table import MacTable
from dydit.costs import ATTENTION_PRODUCTS, MLP

TABLE = MacTable({"block 0": {MLP: 5, ATTENTION_PRODUCTS: 2}, "outside blocks": {"other": 1}})


def test_sums() -> None:
    assert (TABLE.total, TABLE.by_block) == (8, {"block 0": 7, "outside blocks": 1})
    assert list(TABLE.by_part.items()) == [(ATTENTION_PRODUCTS, 2), (MLP, 5), ("other", 1)]
    assert (MacTable().total, MacTable().by_part) == (0, {})
    twice = MacTable.sum([TABLE, TABLE, MacTable()])
    assert twice.total == 16 and twice.cells["block 0"] == {MLP: 10, ATTENTION_PRODUCTS: 4}


def test_differences_name_the_cell() -> None:
    assert TABLE.differences(TABLE) == []
    other = MacTable({"block 0": {MLP: 6, ATTENTION_PRODUCTS: 2}})
    assert TABLE.differences(other) == [
        "block 0, MLP: 5 and 6 MACs",
        "outside blocks, other: 1 and 0 MACs",
    ]
    assert other.differences(TABLE) == [
        "block 0, MLP: 6 and 5 MACs",
        "outside blocks, other: 0 and 1 MACs",
    ]
