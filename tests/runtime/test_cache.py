"""Packings under a budget, for several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydit.errors import ConfigError
from dydit.runtime.cache import Cut, PackCache, check_budget
from dydit.runtime.packing import PackedMlp
from dydit.runtime.slots import Slots

COMPONENTS = torch.arange(10.0).unsqueeze(1)  # component k has one number, k


def make_slots(capacity: int) -> Slots:
    held = torch.empty(capacity, 1)
    return Slots(capacity, 1, [(COMPONENTS, held)], lambda n: PackedMlp(None, (held[:n], None), n))


def cut(key: str, components: list[int], capacity: int | None = None) -> Cut:
    """Of components, one byte each; the mask's number is made of them."""
    capacity = len(components) if capacity is None else capacity
    number = int("1" + "".join(map(str, components)))
    return Cut(key, number, capacity, np.array(components), partial(make_slots, capacity))


def make_cache(budget: int) -> PackCache:
    cache = PackCache()
    cache.reset(budget)
    return cache


def values(packed: PackedMlp) -> list[int]:
    return packed.fc2[0].flatten().int().tolist()


@contextmanager
def reading(cache: PackCache, cuts: Sequence[Cut]) -> Iterator[tuple[list[PackedMlp], bool]]:
    entries, made = cache.take(cuts)
    try:
        yield [entry.packed for entry in entries], made
    finally:
        cache.give_back(entries)


def ask(cache: PackCache, *cuts: Cut) -> tuple[list[list[int]], bool]:
    with reading(cache, cuts) as (packed, made):
        return [values(p) for p in packed], made


def test_the_least_recently_used_slots_leave_first() -> None:
    cache = make_cache(10)
    first, second, third = (cut(key, [1, 2, 3, 4]) for key in ("first", "second", "third"))
    assert [ask(cache, c)[1] for c in (first, second, first)] == [True, True, False]
    assert ask(cache, third)[1]  # "second" has to go
    assert not ask(cache, first)[1] and ask(cache, second)[1]
    assert (cache.bytes, cache.evictions, cache.copied) == (8, 2, 16)


def test_another_mask_of_the_same_key_is_written_over() -> None:
    cache = make_cache(10)
    assert ask(cache, cut("a", [1, 2, 3], capacity=4)) == ([[1, 2, 3]], True)
    assert ask(cache, cut("a", [1, 5, 3, 6], capacity=4)) == ([[1, 5, 3, 6]], True)
    assert (cache.bytes, cache.evictions, cache.copied) == (4, 1, 5)


def test_several_cuts_are_there_together() -> None:
    cache = make_cache(6)
    ask(cache, cut("old", [0, 1]))
    assert ask(cache, cut("a", [1, 2]), cut("b", [3, 4])) == ([[1, 2], [3, 4]], True)
    # "old" and then "a" have been idle longest, but "a" is wanted.
    assert ask(cache, cut("a", [1, 2]), cut("c", [5, 6, 7])) == ([[1, 2], [5, 6, 7]], True)
    assert cache.bytes == 5 and cache.evictions == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_the_budget_is_never_exceeded(requests: list[tuple[int, int]]) -> None:
    cache, held = make_cache(10), 0

    def make(size: int) -> Slots:
        assert cache.bytes + size <= 10  # room was made before
        return make_slots(size)

    for key, size in requests:
        order = np.arange(size)
        with reading(cache, [Cut((key, size), size, size, order, partial(make, size))]) as ((packed,), _):
            assert values(packed) == order.tolist()
        held = max(held, cache.bytes)
    assert held <= 10


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    return thread, found


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(cut("a", [3, 4], capacity=3), id="written over"),
        pytest.param(cut("b", [3, 4]), id="dropped"),
    ],
)
def test_what_is_being_read_stays_until_it_was(other: Cut) -> None:
    cache = make_cache(4)
    with reading(cache, [cut("a", [1, 2, 7], capacity=3)]) as ((packed,), _):
        thread, found = in_thread(lambda: ask(cache, other))
        time.sleep(0.1)
        assert not found and values(packed) == [1, 2, 7]
        assert ask(cache, cut("a", [1, 2, 7], capacity=3))[1] is False  # who wants the same need not wait
    thread.join(10)
    assert found == [([[3, 4]], True)]


def test_threads_never_see_another_mask() -> None:
    """Each asks for two cuts of few keys at a time, under a budget for little more than two."""
    cache = make_cache(9)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            keys = rng.choice(4, 2, replace=False)
            orders = [rng.permutation(10)[: rng.integers(1, 4)].tolist() for _ in keys]
            wanted = [cut(f"k{key}", order, capacity=4) for key, order in zip(keys, orders, strict=True)]
            with reading(cache, wanted) as (packed, _):
                assert [values(p) for p in packed] == orders
                time.sleep(0)
                assert [values(p) for p in packed] == orders
            assert cache.bytes <= 9

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_failed_packing_leaves_the_cache_usable() -> None:
    cache = make_cache(10)
    good = cut("key", [1])

    def fail() -> Slots:
        raise MemoryError

    with pytest.raises(MemoryError):
        ask(cache, Cut("key", good.mask, 1, good.order, fail))
    assert ask(cache, good) == ([[1]], True)
    with pytest.raises(RuntimeError), reading(cache, [good]):
        raise RuntimeError  # the reader's own
    assert ask(cache, cut("key", [2])) == ([[2]], True)  # nobody is reading any more


def test_reset_forgets_the_packings() -> None:
    cache = make_cache(10)
    ask(cache, cut("key", [1, 2]))
    cache.reset(20)
    assert (cache.budget, cache.bytes) == (20, 0)
    assert ask(cache, cut("key", [1, 2]))[1]


def test_a_budget_below_one_block_is_refused() -> None:
    check_budget(5, 5)
    with pytest.raises(ConfigError, match="memory budget of 4 bytes; expected at least one block's 5 bytes"):
        check_budget(4, 5)
    for budget in (float("nan"), "1GB", None):
        with pytest.raises(ConfigError, match=f"memory budget of {budget} bytes"):
            check_budget(budget, 5)
