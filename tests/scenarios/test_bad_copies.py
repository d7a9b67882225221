"""What is given up when a copy in memory turns out to be of no use: it, and not its whole step."""

from typing import Any

import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import (
    BadCopy,
    FailedCopy,
    Holding,
    PreparationFailed,
    Prepared,
    ShardsHeld,
)

CORRUPT, UNREACHABLE = "corrupt", "unreachable"


@pytest.fixture
def cluster(cluster: Any) -> Any:
    """Two nodes of two ranks that hold step 5 of each other, and a spare; a rank has died."""
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    assert restarted(cluster.exit(1)).restore.step == 5
    return cluster


def restarted(decisions: list[Any]) -> Any:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def swap(cluster: Any) -> None:
    """Have the spare take the seats of node-1."""
    cluster.after(0.1).lose("node-1")
    assert restarted(cluster.rest()).seats[2:] == ("node-2", "node-2")


def fail(cluster: Any, node: str, *copies: tuple[str, int, str]) -> Any:
    """Have a node say which copies failed; return the order that comes of it, None for none."""
    failed = tuple(FailedCopy(NodeId(n), Rank(rank), kind) for n, rank, kind in copies)  # type: ignore[arg-type]
    said = PreparationFailed(
        generation=cluster.state.generation,
        step=cluster.state.start_step,
        tier="memory",
        reason="slot 1 is damaged",
        copies=failed,
    )
    cluster.after(0.1).say(node, said)
    orders = [d for d in cluster.rest() if isinstance(d, StartGeneration)]
    return orders[0] if orders else None


HELD_BY_ONE = tuple(Holding(Rank(rank), Step(5)) for rank in range(4))


def mend(cluster: Any, node: str, *bad: tuple[str, int], generation: int | None = None) -> None:
    """Have a node say that it mended its own, and which copies elsewhere were no good for that."""
    found = tuple(BadCopy(NodeId(n), Rank(rank), Step(5), "xxh3-128 is 1: w") for n, rank in bad)
    said = Prepared(
        generation=cluster.state.generation if generation is None else generation,
        step=Step(5),
        own=2,
        fetched=0,
        durable=0,
        seconds=0.1,
        lacking=found,
    )
    cluster.after(0.1).say(node, said)


def names(cluster: Any, node: str, *renewed: int) -> None:
    """Have a node say that it holds step 5 of all ranks, of these since they were replaced."""
    anew = tuple(Holding(Rank(rank), Step(5)) for rank in renewed)
    held = ShardsHeld(generation=cluster.state.generation, holdings=HELD_BY_ONE, renewed=anew)
    cluster.after(0.1).say(node, held)


def holders(cluster: Any, rank: int) -> tuple[str, ...]:
    found: tuple[str, ...] = cluster.state.holders(Step(5), Rank(rank))
    return found


def test_a_copy_that_another_node_found_bad_does_not_count_although_its_holder_names_it(
    cluster: Any,
) -> None:
    mend(cluster, "node-0", ("node-1", 0))
    assert (holders(cluster, 0), holders(cluster, 1)) == (("node-0",), ("node-0", "node-1"))

    names(cluster, "node-1")
    assert holders(cluster, 0) == ("node-0",)


def test_nobody_is_told_to_start_from_a_copy_that_another_node_found_bad(cluster: Any) -> None:
    cluster.join("node-1", incarnation=1)
    mend(cluster, "node-0", ("node-1", 0))

    order = fail(cluster, "node-0", ("node-0", 0, CORRUPT))

    # Of shard 0, another replica's on the other node is left.
    assert order.restore.step == 5
    assert (order.restore.sources[0], order.restore.staged_as[0]) != ("node-1", 0)


def test_a_copy_that_was_replaced_counts_again_also_when_it_is_said_once_more_that_it_was_bad(
    cluster: Any,
) -> None:
    mend(cluster, "node-0", ("node-1", 0))

    names(cluster, "node-1", 0)
    assert holders(cluster, 0) == ("node-0", "node-1")

    # As after a connection that was lost.
    mend(cluster, "node-0", ("node-1", 0))
    names(cluster, "node-1")
    assert holders(cluster, 0) == ("node-0", "node-1")


def test_a_bad_copy_that_its_holder_let_go_of_is_not_held_against_what_it_holds_later(
    cluster: Any,
) -> None:
    mend(cluster, "node-0", ("node-1", 0))

    cluster.say("node-1", ShardsHeld(generation=cluster.state.generation, holdings=HELD_BY_ONE[1:]))
    names(cluster, "node-1")

    assert holders(cluster, 0) == ("node-0", "node-1")


def test_what_a_generation_that_is_over_found_bad_is_bad_in_the_next_one_too(cluster: Any) -> None:
    before = cluster.state.generation
    fail(cluster, "node-1", ("node-1", 2, UNREACHABLE))
    assert cluster.state.generation > before

    mend(cluster, "node-0", ("node-1", 0), generation=before)

    assert holders(cluster, 0) == ("node-0",)


def test_a_corrupt_copy_is_replaced_by_the_buddys_and_the_step_is_kept(cluster: Any) -> None:
    order = fail(cluster, "node-1", ("node-1", 2, CORRUPT))

    assert order.restore.step == 5
    assert order.restore.sources == ("node-0", "node-0", "node-0", "node-1")
    assert "slot 1 is damaged" in order.reason


def test_a_bad_copy_does_not_count_again_although_its_holder_names_it_still(cluster: Any) -> None:
    fail(cluster, "node-1", ("node-1", 2, CORRUPT))

    cluster.hold(5)

    assert cluster.state.holders(Step(5), Rank(2)) == ("node-0",)


def test_a_copy_that_its_holder_has_anew_counts_again(cluster: Any) -> None:
    fail(cluster, "node-1", ("node-1", 2, CORRUPT))
    generation = cluster.state.generation
    others = tuple(Holding(Rank(rank), Step(5)) for rank in (0, 1, 3))

    cluster.say("node-1", ShardsHeld(generation=generation, holdings=others))
    cluster.hold(5)

    assert cluster.state.holders(Step(5), Rank(2)) == ("node-0", "node-1")


def test_a_shard_that_nobody_has_any_more_is_had_from_what_another_replica_staged(
    cluster: Any,
) -> None:
    fail(cluster, "node-1", ("node-1", 2, CORRUPT))

    order = fail(cluster, "node-0", ("node-0", 2, CORRUPT))

    assert order.restore.step == 5
    assert order.restore.staged_as == (0, 1, 0, 3), "two replicas of two shards"


def test_a_step_is_given_up_when_no_copy_of_one_of_its_shards_is_left(cluster: Any) -> None:
    fail(cluster, "node-1", ("node-1", 2, CORRUPT))
    fail(cluster, "node-0", ("node-0", 2, CORRUPT))
    fail(cluster, "node-0", ("node-0", 0, CORRUPT))

    assert fail(cluster, "node-1", ("node-1", 0, CORRUPT)) is None

    assert restarted(cluster.after(0.1).found()).restore is None


def test_a_copy_out_of_reach_is_had_from_elsewhere_and_is_not_held_against_anybody_else(
    cluster: Any,
) -> None:
    swap(cluster)
    cluster.join("node-3")
    cluster.join("node-1", incarnation=2)

    order = fail(cluster, "node-2", ("node-0", 2, UNREACHABLE))

    # No other node has it, but another can take the seat.
    assert order.restore.step == 5
    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.restore.sources == ("node-0",) * 4


def test_a_node_without_room_for_a_copy_gives_its_seat_to_one_that_may_have_it(
    cluster: Any,
) -> None:
    swap(cluster)
    cluster.join("node-1", incarnation=2)

    order = fail(cluster, "node-2", ("node-2", 2, "no-room"))

    assert order.restore.step == 5
    assert order.seats[2:] == ("node-1", "node-1")


def test_a_node_that_nobody_can_replace_goes_on_from_what_it_can_have(cluster: Any) -> None:
    swap(cluster)

    assert fail(cluster, "node-2", ("node-0", 2, UNREACHABLE)) is None

    assert restarted(cluster.after(0.1).found()).seats[2:] == ("node-2", "node-2")


@pytest.mark.parametrize("kind", [CORRUPT, UNREACHABLE, "no-room"])
def test_what_fails_again_in_a_way_that_is_known_ends_with_that_step(
    cluster: Any, kind: str
) -> None:
    copy = ("node-0", 2, kind)
    fail(cluster, "node-1", copy)

    assert fail(cluster, "node-1", copy) is None

    assert restarted(cluster.after(0.1).found()).restore is None


def test_a_failure_that_is_told_twice_is_one(cluster: Any) -> None:
    said = PreparationFailed(
        generation=cluster.state.generation,
        step=Step(5),
        tier="memory",
        reason="slot 1 is damaged",
        copies=(FailedCopy(NodeId("node-1"), Rank(2), "corrupt"),),
    )

    cluster.after(0.1).say("node-1", said)
    cluster.after(0.1).say("node-1", said)

    assert restarted(cluster.rest()).restore.step == 5


def test_what_others_lack_counts_although_the_first_that_said_so_has_ended_the_generation(
    cluster: Any,
) -> None:
    generation = cluster.state.generation
    fail(cluster, "node-1", ("node-1", 2, "absent"))
    late = PreparationFailed(
        generation=generation,
        step=Step(5),
        tier="memory",
        reason="slot 1 is empty",
        copies=(FailedCopy(NodeId("node-0"), Rank(0), "absent"),),
    )

    cluster.after(0.1).say("node-0", late)
    order = fail(cluster, "node-1", ("node-1", 3, "absent"))

    assert order.restore.step == 5
    copies = list(zip(order.restore.sources, order.restore.staged_as, strict=True))
    assert not {("node-1", 2), ("node-0", 0), ("node-1", 3)} & {*copies}


def test_what_is_said_late_of_a_copy_that_the_next_generation_could_not_know_ends_no_step(
    cluster: Any,
) -> None:
    generation = cluster.state.generation
    fail(cluster, "node-1", ("node-1", 2, "absent"))
    late = (FailedCopy(NodeId("node-0"), Rank(0), "absent"),)
    said = PreparationFailed(
        generation=generation, step=Step(5), tier="memory", reason="empty", copies=late
    )

    cluster.after(0.1).say("node-0", said)
    order = fail(cluster, "node-0", ("node-0", 0, "absent"))

    assert order.restore.step == 5


def test_a_node_that_has_verified_a_copy_after_all_counts_as_its_holder(cluster: Any) -> None:
    fail(cluster, "node-1", ("node-1", 2, CORRUPT))

    cluster.resume()
    cluster.train(3)
    cluster.hold(8)
    order = restarted(cluster.after(0.1).exit(1, step=8))

    assert order.restore.step == 8
    assert cluster.state.struck == {}
