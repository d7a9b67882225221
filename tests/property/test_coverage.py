"""One number for each shard tells whether their boxes make up whole tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol import coverage
from storage.coverage import PRIME, gap, whole


class Part(NamedTuple):
    """A box of a tensor."""

    name: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    def items(self) -> list[tuple[int, ...]]:
        """Return the places of its items."""
        sides = (range(at, at + n) for at, n in zip(self.offset, self.shape, strict=True))
        return list(product(*sides))


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, name: str) -> list[Part]:
    """Draw a tensor that is cut into a grid, and held by one or two of each part's owners."""
    whole = draw(SHAPES)
    edges = [sorted({0, side, *draw(st.lists(st.integers(0, side), max_size=2))}) for side in whole]
    spans = [list(pairwise(each)) or [(0, 0)] for each in edges]
    grid = [
        Part(name, tuple(b - a for a, b in box), whole, tuple(a for a, _ in box))
        for box in product(*spans)
    ]
    return grid * draw(st.integers(1, 2))


STATES = st.tuples(cuts("param/a"), cuts("param/b")).map(lambda both: [*both[0], *both[1]])


def is_whole(parts: list[Part]) -> bool:
    """Return whether every item of each tensor is there as often as its first one."""
    seen = Counter((part.name, item) for part in parts for item in part.items())
    shapes = {part.name: part.global_shape for part in parts}
    return all(
        seen[name, item] == seen[name, (0,) * len(shape)]
        for name, shape in shapes.items()
        for item in product(*map(range, shape))
    )


def gaps(parts: list[Part], owners: list[int]) -> list[int]:
    """Return the gap of each shard; a part belongs to the shard of that number."""
    shards = [
        [p for p, owner in zip(parts, owners, strict=True) if owner == shard] for shard in range(4)
    ]
    return [gap(shard) for shard in shards]


@given(parts=STATES, data=st.data())
def test_gaps_add_up_to_nothing_however_parts_are_dealt_out(
    parts: list[Part], data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(parts), max_size=len(parts)))

    told = gaps(parts, owners)

    assert all(0 <= each < PRIME for each in told)
    assert not coverage.missing(told)


@given(parts=STATES, data=st.data())
def test_a_part_that_is_lost_moved_or_there_twice_is_told(
    parts: list[Part], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(parts) - 1))
    change = data.draw(st.sampled_from(["lost", "twice", "moved", "shorter"]))
    part = parts[at]
    if change == "lost":
        parts = parts[:at] + parts[at + 1 :]
    elif change == "twice":
        parts = [*parts, part]
    elif part.shape:
        side = data.draw(st.integers(0, len(part.shape) - 1))
        values = list(part.offset if change == "moved" else part.shape)
        values[side] = max(values[side] - 1, 0)
        field = "offset" if change == "moved" else "shape"
        parts = [*parts[:at], part._replace(**{field: tuple(values)}), *parts[at + 1 :]]

    assert coverage.missing(gaps(parts, [0] * len(parts))) == (not is_whole(parts))


def test_the_controller_adds_up_by_the_number_that_shards_take_theirs_by() -> None:
    assert coverage.PRIME == PRIME


@given(grid=cuts("param/a"), data=st.data())
def test_boxes_are_a_whole_tensor_if_they_have_every_item_as_often(
    grid: list[Part], data: st.DataObject
) -> None:
    shape = grid[0].global_shape
    spans = st.tuples(*(st.integers(0, side).flatmap(_span_in(side)) for side in shape))
    drawn = data.draw(st.lists(spans, max_size=3))
    parts = grid[data.draw(st.integers(0, len(grid))) :] if drawn else grid
    parts = [*parts, *(Part("", tuple(n for _, n in one), shape, _at(one)) for one in drawn)]

    seen = Counter(item for part in parts for item in part.items())

    often = {seen[item] for item in product(*map(range, shape))}
    boxes = [(part.offset, part.shape) for part in parts]
    assert whole(shape, boxes) == (often <= {max(often, default=1)} - {0})


def _at(spans: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    return tuple(at for at, _ in spans)


def _span_in(side: int) -> Callable[[int], st.SearchStrategy[tuple[int, int]]]:
    return lambda at: st.tuples(st.just(at), st.integers(0, side - at))


def test_a_tensor_that_one_shard_takes_for_larger_than_the_other_is_not_whole() -> None:
    halves = [Part("param/w", (4,), (4,), (0,)), Part("param/w", (4,), (8,), (4,))]

    assert coverage.missing(gaps(halves, [0, 1]))


def test_large_tensors_cost_no_more_than_small_ones() -> None:
    side = 1 << 40
    halves = [Part("param/w", (side, side), (2 * side, side), (at * side, 0)) for at in range(2)]

    assert not coverage.missing(gaps(halves, [0, 1]))
    assert coverage.missing(gaps(halves[:1], [0]))
    assert math.prod(halves[0].shape) == 1 << 80
