"""When an agent says in which collectives its ranks stand, and of whom."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.agent.account import Account
from orchestrator.agent.counts import stood_s, untold
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import GroupCounts, StepReport
from orchestrator.protocol.timeouts import derive
from orchestrator.worker.beacon import BeaconReader, BeaconWriter, create

AFTER_S = 3.0
LONG_NS, SHORT_NS = int(3.1e9), int(2.9e9)


class Node:
    """Two ranks in a group, and the agent's look at their beacons."""

    def __init__(self, folder: Path) -> None:
        self.account = Account()
        self.account.begin(Generation(3), (Rank(4), Rank(5)))
        self.writers, self.readers = {}, {}
        for rank in self.account.ranks:
            create(page := folder / f"{rank}")
            self.writers[rank], self.readers[rank] = BeaconWriter(page), BeaconReader(page)
            self.writers[rank].update(generation=Generation(3))
            self.writers[rank].groups(["all", f"shard@{rank}", "tp@4"])
        self.writers[Rank(4)].enter(2)
        self.writers[Rank(5)].enter(1)

    def untold(self, later_ns: int) -> tuple[GroupCounts, ...]:
        """Look so long after the last sign of life."""
        moved_ns = max(writer.now.moved_ns for writer in self.writers.values())
        return untold(self.account, self.readers, moved_ns + later_ns, AFTER_S)


COUNTS = (
    GroupCounts("all", (Rank(4), Rank(5)), (0, 0), (0, 0)),
    GroupCounts("shard@4", (Rank(4),), (0,), (0,)),
    GroupCounts("tp@4", (Rank(4), Rank(5)), (1, 0), (0, 0)),
    GroupCounts("shard@5", (Rank(5),), (1,), (0,)),
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    for reader in node.readers.values():
        reader.close()


def test_what_ranks_have_entered_is_told_if_anybody_says(node: Node) -> None:
    node.writers[Rank(4)].enter(2, "allreduce of 8 B")

    (tp,) = (row for row in node.untold(LONG_NS) if row.group == "tp@4")

    assert tp == GroupCounts("tp@4", (Rank(4), Rank(5)), (2, 0), (0, 0), ("allreduce of 8 B", ""))


def test_ranks_that_move_are_not_told_of(node: Node) -> None:
    assert node.untold(SHORT_NS) == ()


def test_ranks_that_stand_still_are_told_of_once_as_columns(node: Node) -> None:
    assert node.untold(LONG_NS) == COUNTS
    assert node.untold(2 * LONG_NS) == ()


def test_they_are_told_of_again_once_they_moved_and_on_a_new_connection(node: Node) -> None:
    node.untold(LONG_NS)
    node.account.reconnected(Step(0))
    assert node.untold(LONG_NS) == COUNTS

    node.writers[Rank(5)].leave(1)
    assert node.untold(SHORT_NS) == ()
    (told,) = [row for row in node.untold(LONG_NS) if row.group == "shard@5"]
    assert (told.entered, told.left) == ((1,), (1,))


def test_who_is_not_in_this_generation_yet_is_not_told_of(node: Node) -> None:
    node.writers[Rank(5)].update(generation=Generation(2))

    assert {rank for row in node.untold(LONG_NS) for rank in row.ranks} == {4}


def test_standing_still_is_told_well_before_it_is_a_hang_and_not_within_a_step() -> None:
    account, limits = Account(), derive(10.0, 600.0)
    account.begin(Generation(1), (Rank(0),))
    assert stood_s(account, limits) == limits.hang_s / 2

    seconds = (20.0, 90.0, 22.0)
    account.record(
        StepReport(Step(step), 1.0, 1.0, 8, s) for step, s in enumerate(seconds, start=1)
    )

    assert stood_s(account, limits) == limits.hang_s / 2 + 22.0
