"""What a step waited while all ways were well, and since one is not."""

import pytest

from orchestrator.core.ways import IN_A_ROW, KNOWN_MIN, SAMPLES, Ways
from orchestrator.protocol.ids import NodeId, Seconds

RING = [(NodeId(f"n{at}"), NodeId(f"n{(at + 1) % 5}")) for at in range(5)]
FIRST, *OTHERS = RING


def hear(ways: Ways, *told: tuple[NodeId, NodeId], rate: float = 1e9, at: float = 0.0) -> None:
    for way in told:
        ways.hear(way, rate, Seconds(at), training=True)


def take(ways: Ways, waited_s: float, times: int = KNOWN_MIN) -> None:
    for at in range(times):
        ways.take(waited_s + 1e-4 * (at % 5))


def heard() -> Ways:
    """Ways of which each was well for two rounds, in which steps waited for 0.1 s."""
    ways = Ways(5)
    hear(ways, *RING)
    for _ in range(2):
        take(ways, 0.1)
        hear(ways, *RING)
    return ways


def test_what_was_waited_after_a_way_was_told_to_be_well_is_not_what_it_was_before() -> None:
    """It may have turned slow at once: four copies later it is known."""
    ways = heard()
    hear(ways, FIRST)
    take(ways, 0.5, SAMPLES)
    hear(ways, *OTHERS)

    hear(ways, FIRST, rate=1e8)
    take(ways, 0.5)

    waited = ways.waited()
    assert waited is not None
    assert waited.before_s == pytest.approx(0.1, abs=1e-3)
    assert waited.now_s == pytest.approx(0.5, abs=1e-3)
    assert waited.grown


def test_a_way_that_is_well_again_ends_what_was_waited_for_it_though_another_is_slow() -> None:
    ways = heard()
    hear(ways, FIRST, OTHERS[0], rate=1e8, at=10.0)
    take(ways, 0.5)

    hear(ways, FIRST, at=20.0)

    assert ways.waited() is None
    assert ways.slow_since == 20.0


def test_what_was_waited_before_is_known_to_the_next_world_of_the_same_size() -> None:
    ways = heard()
    for size, known in ((5, True), (4, False)):
        after = ways.renewed(size)
        hear(after, *RING)
        for _ in range(IN_A_ROW):
            hear(after, FIRST, rate=1e8)
        take(after, 0.5)

        assert (after.waited() is not None) is known


def test_growth_within_what_it_differs_by_anyway_is_none() -> None:
    ways = Ways(5)
    hear(ways, *RING)
    for _ in range(3):
        for at in range(KNOWN_MIN):
            ways.take(0.1 + 0.02 * (at % 5))
        hear(ways, *RING)
    hear(ways, FIRST, rate=1e8)
    take(ways, 0.2)

    waited = ways.waited()
    assert waited is not None
    assert waited.now_s > waited.before_s + 0.05
    assert not waited.grown
