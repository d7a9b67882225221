"""A world that stands still is looked at before anything is done about it, and once."""

import pytest

from orchestrator.core.decisions import InspectRanks, StartGeneration, WakeAt
from orchestrator.core.incident import Incident
from orchestrator.core.inspection import PLACES_MAX
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import StacksTaken
from orchestrator.protocol.stacks import Stack
from tests.conftest import Cluster

BEHIND = Stack((Rank(2),), ("get (queue.py:171)", "next_batch (loader.py:40)"))
WAITING = ("all_reduce (distributed_c10d.py:2806)", "step (step.py:40)")


def seen(*stacks: Stack, problem: str = "") -> StacksTaken:
    return StacksTaken(generation=Generation(1), stacks=stacks, problem=problem)


def hang(cluster: Cluster) -> Cluster:
    """Stop rank 2, until it is noticed."""
    for _ in range(200):
        if any(isinstance(d, InspectRanks) for d in cluster.decisions):
            return cluster
        cluster.after(0.1).beat(step=5, moving=lambda rank: rank != 2, states="SSTS")
    pytest.fail("nobody was asked")


@pytest.fixture
def hung(cluster: Cluster) -> Cluster:
    """Rank 2 of 4 is stopped, and that was just noticed."""
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    return hang(cluster)


def found(cluster: Cluster) -> Incident:
    (incident,) = cluster.state.incidents
    assert incident.kind == "hang"
    return incident


def test_nodes_are_asked_before_ranks_are_moved_on_and_once(hung: Cluster) -> None:
    kinds = [type(d) for d in hung.decisions]
    asked = kinds.index(InspectRanks)
    order = hung.decisions[asked]

    assert isinstance(order, InspectRanks)
    assert (order.nodes, order.suspects) == (("node-0", "node-1"), (2,))
    assert isinstance(hung.decisions[asked + 1], StartGeneration)
    hung.after(0.1).tick()
    assert sum(isinstance(d, InspectRanks) for d in hung.decisions) == 1


def test_what_nodes_saw_is_one_picture_with_the_lonely_place_first(hung: Cluster) -> None:
    assert hung.state.generation == 2  # the answers come when that is under way

    hung.say("node-0", seen(Stack((Rank(0), Rank(1)), WAITING)))
    hung.say("node-1", seen(BEHIND, Stack((Rank(3),), WAITING)))

    assert found(hung).stacks == (BEHIND, Stack((Rank(0), Rank(1), Rank(3)), WAITING))


def test_an_answer_that_comes_twice_changes_nothing(hung: Cluster) -> None:
    for _ in range(2):
        hung.say("node-1", seen(BEHIND, problem="rank 3: not seen in time"))

    assert found(hung).stacks == (BEHIND,)
    assert found(hung).unseen == {"node-1": "rank 3: not seen in time"}


def test_an_answer_that_nobody_asked_for_is_dropped(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(5)

    cluster.say("node-1", seen(BEHIND))

    assert cluster.state.incidents == []


def test_of_very_many_places_the_first_are_kept_and_it_is_said(hung: Cluster) -> None:
    many = [Stack((Rank(2),), (f"f{n} (a.py:{n})",)) for n in range(PLACES_MAX + 1)]

    hung.say("node-1", seen(*many))

    assert len(found(hung).stacks) == PLACES_MAX
    assert "more than 64 places" in found(hung).unseen["node-1"]


@pytest.fixture
def last(cluster: Cluster) -> Cluster:
    """No restart is left, and a rank hangs."""
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.state.budgets["hardware"].spent = cluster.state.budgets["hardware"].limit
    return hang(cluster)


def test_the_hang_that_ends_a_run_is_looked_at_before_it_ends(last: Cluster) -> None:

    assert last.state.end_state == ""
    last.say("node-0", seen(Stack((Rank(0), Rank(1)), WAITING)))
    assert last.state.end_state == ""
    last.say("node-1", seen(BEHIND, Stack((Rank(3),), WAITING)))

    assert last.state.end_state == "Failed"
    assert found(last).stacks[0] == BEHIND


def test_a_run_ends_without_the_answers_of_nodes_that_do_not_answer(last: Cluster) -> None:
    (woken,) = (d for d in last.decisions if isinstance(d, WakeAt) and "stand" in d.reason)

    last.now = woken.at
    last.tick()

    assert last.state.end_state == "Failed"
