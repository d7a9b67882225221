"""What becomes of a node whose own network is slow: it is swapped if steps wait since then."""

from __future__ import annotations

import pytest

from orchestrator import compose
from orchestrator.core import snapshot
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import Telemetry
from orchestrator.core.ways import KNOWN_MIN
from orchestrator.policy import networks
from orchestrator.protocol.ids import NodeId, Step
from orchestrator.protocol.messages import LinkTimed, StepReport
from orchestrator.protocol.phases import RankPhase
from tests import runfiles
from tests.conftest import Cluster

NODES = 7
USUAL, SLOW = 1e9, 1e8
COMPUTE_S, WAIT_S = 0.4, 0.1
SICK = NodeId("node-3")
BOTH = ("node-0", "node-3")
"""Whose ways are slow, if both of node-3 are: in a world of seven, the buddy is three away."""


def ring(spares: int = 1, nodes: int = NODES, **spec: object) -> Cluster:
    cluster = Cluster(
        runfiles.text(
            nodes={"count": nodes, "ranksPerNode": 1, "spares": spares},
            trainer={"steps": 10_000},
            parallelism={"dpReplicate": 1, "dpShard": nodes},
            **spec,
        )
    )
    cluster.begin([f"node-{n}" for n in range(nodes + spares)])
    return cluster


def train(cluster: Cluster, steps: int, wait_s: float = WAIT_S, slow: tuple[str, ...] = ()) -> None:
    """Take steps that wait so long for the network; after every fifth each node tells its way."""
    first = cluster.state.reached_step + 1
    for step in range(first, first + steps):
        # By a tenth of a millisecond more or less: what is waited is never twice the same.
        took_s = COMPUTE_S + wait_s + 1e-4 * (step % 7)
        cluster.after(took_s)
        cluster.progress += 1
        compute_s = tuple(
            COMPUTE_S - 0.001 * (rank % 2) for rank in range(len(cluster.state.seats))
        )
        cluster.tell(
            Telemetry(
                at=cluster.at(), generation=cluster.state.generation,
                heard=tuple(sorted(cluster.state.nodes)), phases=(int(RankPhase.FORWARD),),
                steps=(step,), progress=(cluster.progress,), states="S", cpu_s=(0.0,),
                stall_s=0.0, compute_s=compute_s,
                reports=(StepReport(Step(step), 2.0, 1.0, 100, took_s),),
            )
        )  # fmt: skip
        if step % 5 == 0:
            for node, to in sorted(cluster.state.buddies.items()):
                rate = SLOW if node in slow else USUAL
                fact = LinkTimed(
                    generation=cluster.state.generation, to=to, bytes_per_s=rate, copies=4
                )
                cluster.say(node, fact)


def go_on(cluster: Cluster, wait_s: float, slow: tuple[str, ...], times: int = 30) -> None:
    """Train until there is a restart, ten steps and a save so many times at most."""
    generation = cluster.state.generation
    for _ in range(times):
        train(cluster, 10, wait_s, slow)
        cluster.hold(cluster.state.reached_step)
        if cluster.state.generation != generation:
            return


def starts(cluster: Cluster) -> list[StartGeneration]:
    return [d for d in cluster.decisions if isinstance(d, StartGeneration)]


def standing(cluster: Cluster) -> str:
    return networks.standing(cluster.state, SICK)


def test_a_node_whose_network_makes_steps_wait_is_swapped_once_that_has_cost_as_much() -> None:
    cluster = ring()
    train(cluster, 60)

    go_on(cluster, 3 * WAIT_S, BOTH)

    order = starts(cluster)[-1]
    assert order.generation == 2
    assert SICK not in order.seats
    assert "the network of node-3 is slow (inc-1: copies take 10.0 times as long" in order.reason
    assert "nobody computes for 0.3 s of a step, 0.1 s before" in order.reason
    keep_s, swap_s = costs(order.reason)
    assert keep_s > swap_s > 0
    assert cluster.state.budgets["hardware"].spent == 0
    assert "a spare of last resort" in standing(cluster)


def costs(reason: str) -> tuple[float, float]:
    """Return the two numbers in a reason: to keep a node, and to swap it."""
    words = reason.replace(";", "").split()
    keep_s, swap_s = (
        float(words[i + 1])
        for i, word in enumerate(words)
        if word in {"costs", "it"} and words[i + 1].replace(".", "").isdigit()
    )
    return keep_s, swap_s


def test_it_is_kept_until_then_and_the_reason_has_both_numbers() -> None:
    cluster = ring()
    train(cluster, 60)
    restart_s = cluster.state.timeouts.form_s

    train(cluster, 40, 1.2 * WAIT_S, BOTH)
    cluster.hold(cluster.state.reached_step)

    assert len(starts(cluster)) == 1
    assert f"a swap {restart_s:.0f} s" in standing(cluster)
    assert "kept: that costs " in standing(cluster)


@pytest.mark.parametrize(
    ("slow", "why"),
    [
        (("node-3",), "the cable between two nodes"),
        (("node-0", "node-1", "node-3"), "another way is slow, too"),
        (("node-3", "node-5"), "two ways that have no node in common"),
    ],
)
def test_nobody_is_swapped_unless_both_ways_of_one_node_are_slow_and_no_others(
    slow: tuple[str, ...], why: str
) -> None:
    cluster = ring()
    train(cluster, 60)

    go_on(cluster, 5 * WAIT_S, slow)

    assert len(starts(cluster)) == 1, why


@pytest.mark.parametrize("wait_s", [WAIT_S, 0.5 * WAIT_S])
def test_a_slow_network_that_no_step_waits_for_is_only_told_of(wait_s: float) -> None:
    cluster = ring()
    train(cluster, 60)

    go_on(cluster, wait_s, BOTH)

    assert len(starts(cluster)) == 1
    assert [incident.kind for incident in cluster.state.incidents][:1] == ["slow-link"]
    assert standing(cluster).endswith("kept: it is not known that steps wait for it")


def test_what_steps_waited_before_has_to_be_known() -> None:
    cluster = ring()
    train(cluster, KNOWN_MIN // 2)

    go_on(cluster, 5 * WAIT_S, BOTH)

    assert len(starts(cluster)) == 1


def test_steps_that_began_to_wait_before_it_was_told_are_not_what_it_was_before() -> None:
    cluster = ring()
    train(cluster, 42)
    # Slow from here on, which four copies are needed to see.
    train(cluster, 7, 3 * WAIT_S)

    go_on(cluster, 3 * WAIT_S, BOTH)

    assert "nobody computes for 0.3 s of a step, 0.1 s before" in starts(cluster)[-1].reason


def test_a_network_that_is_well_again_is_no_reason_any_more() -> None:
    cluster = ring()
    train(cluster, 60)
    train(cluster, 25, 3 * WAIT_S, BOTH)

    go_on(cluster, 3 * WAIT_S, ())

    assert len(starts(cluster)) == 1


def test_without_a_spare_it_is_kept_and_that_is_said() -> None:
    cluster = ring(spares=0)
    train(cluster, 60)

    go_on(cluster, 3 * WAIT_S, BOTH)

    assert len(starts(cluster)) == 1
    assert standing(cluster).endswith("waiting for a spare that is not slow")


def test_a_run_that_does_without_is_told_and_swaps_nobody() -> None:
    cluster = ring(recovery={"disable": ["link-swap"]})
    train(cluster, 60)

    go_on(cluster, 3 * WAIT_S, BOTH)

    assert len(starts(cluster)) == 1
    assert cluster.state.incidents[0].nodes == (SICK,)


def test_a_node_gives_up_its_seats_for_that_once() -> None:
    cluster = ring()
    train(cluster, 60)
    go_on(cluster, 3 * WAIT_S, BOTH)
    cluster.resume()
    assert SICK not in cluster.state.seated
    # The node in its place is lost, and there is no other.
    cluster.hold(cluster.state.reached_step)
    cluster.lose("node-7")
    cluster.resume()
    assert SICK in cluster.state.seated
    cluster.after(1).join("node-7", incarnation=2)
    source = next(node for node, to in cluster.state.buddies.items() if to == SICK)
    train(cluster, 60)
    generation = cluster.state.generation

    go_on(cluster, 4 * WAIT_S, (source, SICK))

    assert cluster.state.generation == generation
    assert standing(cluster).endswith("kept: it gave up its seats for that once")


def test_whoever_succeeds_a_controller_knows_what_steps_waited() -> None:
    cluster = ring()
    train(cluster, 60)
    train(cluster, 30, 3 * WAIT_S, BOTH)

    data = snapshot.take(cluster.controller)
    successor = snapshot.restore(data, compose.controller(cluster.run))

    assert snapshot.take(successor) == data
    assert successor.state.ways.waited() == cluster.state.ways.waited() is not None
    assert not successor.state.slow_networks[SICK].left


PAIR = ("node-0", "node-3")
"""In a world of six each is the other's buddy."""


def test_of_two_that_are_each_others_buddy_nobody_knows_which_and_both_leave_together() -> None:
    cluster = ring(spares=2, nodes=6)
    train(cluster, 60)

    go_on(cluster, 3 * WAIT_S, PAIR)

    (told,) = (each for each in cluster.state.incidents if each.kind == "slow-link")
    assert told.nodes == PAIR
    assert "it is the network of one of the two, which is not known" in told.findings[0].evidence
    order = starts(cluster)[-1]
    assert set(PAIR).isdisjoint(order.seats)
    assert "the network of node-0 or node-3 is slow" in order.reason


def ways_of(cluster: Cluster, node: str) -> tuple[str, ...]:
    """Return the nodes whose ways lead to a node or from it."""
    return tuple(n for n, to in sorted(cluster.state.buddies.items()) if node in {n, to})


def test_of_two_whose_ways_are_the_same_the_next_generation_tells_and_one_spare_is_enough() -> None:
    cluster = ring(spares=1, nodes=6)
    train(cluster, 60)
    go_on(cluster, 3 * WAIT_S, PAIR)
    assert len(starts(cluster)) == 1, "there are not two spares"
    cluster.exit(rank=2)
    cluster.resume()
    assert cluster.state.buddies["node-3"] != "node-0"
    assert cluster.state.buddies["node-0"] == "node-3"

    go_on(cluster, 3 * WAIT_S, ways_of(cluster, SICK))

    told = [each.nodes for each in cluster.state.incidents if each.kind == "slow-link"]
    assert told == [PAIR, (SICK,)]
    order = starts(cluster)[-1]
    assert SICK not in order.seats
    assert "node-0" in order.seats
    assert all(order.buddies[order.buddies[node]] == node for node in order.buddies)


def test_of_two_of_which_one_is_slow_none_is_swapped_for_a_single_spare() -> None:
    cluster = ring(spares=1, nodes=6)
    train(cluster, 60)

    go_on(cluster, 3 * WAIT_S, PAIR)

    assert len(starts(cluster)) == 1
    assert standing(cluster).endswith("waiting for 2 spares that are not slow")
