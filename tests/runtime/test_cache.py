"""Packings under a budget, in an arena or without one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dydit.errors import ConfigError
from dydit.runtime.arena import ALIGNMENT, Arena
from dydit.runtime.cache import PackCache, arena_for, check_budget
from dydit.runtime.packing import New

LIKE = torch.zeros(1, dtype=torch.uint8)


@dataclass
class Entry:
    """What the cache keeps: its size, and copies where a test makes some."""

    copied_bytes: int
    copies: list[Tensor] = field(default_factory=list)


def make_cache(budget: int, arena: Arena | None = None) -> PackCache:
    cache = PackCache()
    cache.reset(budget, arena)
    return cache


def test_the_least_recently_used_packing_leaves_first() -> None:
    cache = make_cache(10)
    first, second, third = Entry(4), Entry(4), Entry(4)
    assert cache.get("first", 4, lambda _: first) is first
    assert cache.get("second", 4, lambda _: second) is second
    assert cache.get("first", 4, lambda _: pytest.fail("made twice")) is first
    assert cache.get("third", 4, lambda _: third) is third  # "second" has to go
    assert cache.get("first", 4, lambda _: pytest.fail("the one just used was dropped")) is first
    again = Entry(4)
    assert cache.get("second", 4, lambda _: again) is again
    assert (cache.bytes, cache.evictions) == (8, 2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), max_size=40))
def test_the_budget_is_never_exceeded(requests: list[tuple[int, int]]) -> None:
    cache, made = make_cache(10), []
    for key, size in requests:

        def make(_: New, size: int = size) -> Entry:
            alive = [packed() for packed in made]
            assert sum(p.copied_bytes for p in alive if p is not None) + size <= 10  # room was made before
            packed = Entry(size)
            made.append(weakref.ref(packed))
            return packed

        cache.get(key, size, make)
        assert cache.bytes <= 10


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 2000), st.booleans()), max_size=60))
def test_in_an_arena_packings_make_room_and_nobody_elses_copies_are_touched(
    requests: list[tuple[int, int, bool]],
) -> None:
    """Some packings stay in use after they were dropped, as in other threads."""
    arena = Arena(4096)
    cache, in_use = make_cache(4096, arena), []
    for number, (key, size, keep) in enumerate(requests):

        def make(new: New, size: int = size, number: int = number) -> Entry:
            return Entry(size, [new(LIKE, (size,)).fill_(number)])

        (copy,) = cache.get((key, size), size, make).copies
        if keep:
            in_use.append((copy, int(copy[0])))
        assert cache.bytes <= 4096
        for kept, value in in_use:
            assert (kept == value).all()


def test_a_gap_is_made_by_dropping_the_oldest_packings() -> None:
    """Three of four quarters hold packings and two are dropped by bytes already: the rest is in two parts."""
    cache = make_cache(4 * ALIGNMENT, Arena(4 * ALIGNMENT))

    def get(key: str, quarters: int) -> Tensor:
        size = quarters * ALIGNMENT
        return cache.get(key, size, lambda new: Entry(size, [new(LIKE, (size,))])).copies[0]

    places = [get(key, 1).data_ptr() for key in "abcd"]
    assert places == [places[0] + i * ALIGNMENT for i in range(4)]
    get("a", 1)
    get("c", 1)
    assert get("large", 2).data_ptr() == places[0]  # b and d leave first, but are no neighbours
    assert (cache.bytes, cache.evictions) == (3 * ALIGNMENT, 3)
    assert get("c", 1).data_ptr() == places[2]


def test_what_fits_no_gap_lies_elsewhere() -> None:
    cache = make_cache(10**6, Arena(ALIGNMENT))
    copy = cache.get("large", 1000, lambda new: Entry(1000, [new(LIKE, (1000,)).fill_(3)])).copies[0]
    assert copy.sum() == 3000


def test_a_failed_packing_leaves_the_cache_usable() -> None:
    cache = make_cache(10)
    with pytest.raises(MemoryError):
        cache.get("key", 1, lambda _: (_ for _ in ()).throw(MemoryError()))
    packed = Entry(1)
    assert cache.get("key", 1, lambda _: packed) is packed


def test_reset_forgets_the_packings() -> None:
    cache = make_cache(10)
    cache.get("key", 4, lambda _: Entry(4))
    cache.reset(20)
    assert (cache.budget, cache.bytes) == (20, 0)
    packed = Entry(4)
    assert cache.get("key", 4, lambda _: packed) is packed


def test_only_the_cpu_has_an_arena() -> None:
    assert isinstance(arena_for(torch.zeros(1), 100), Arena)
    assert arena_for(torch.zeros(1, device="meta"), 100) is None
    assert arena_for(torch.zeros(1), 0) is None
    assert arena_for(torch.zeros(1), 2**60) is None  # more than a process can address


def test_a_budget_below_one_block_is_refused() -> None:
    check_budget(5, 5)
    with pytest.raises(ConfigError, match="memory budget of 4 bytes; expected at least one block's 5 bytes"):
        check_budget(4, 5)
