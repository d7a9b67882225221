"""What a controller that takes over makes of what it finds: it disturbs nobody who is well."""

from typing import Any

from orchestrator.core.decisions import CatchUp, StartGeneration
from orchestrator.core.events import CheckpointCommitted, ControllerStarted
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Generation, Step
from tests.orders import started


def test_a_successor_takes_over_without_disturbing_the_ranks(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)

    decisions = cluster.after(2).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in ("node-0", "node-1", "node-2"):
        generation = 0 if node == "node-2" else 1
        decisions += cluster.after(0.1).join(node, generation=generation, mark=5)

    assert not [d for d in decisions if isinstance(d, StartGeneration)]
    assert cluster.state.incidents[-1].kind == "controller-restart"
    assert cluster.state.phase is RunPhase.TRAINING


def test_a_successor_in_the_middle_of_a_recovery_goes_on_with_the_incident_it_is_for(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(15), epoch=Generation(1), key="commits/15")
    )
    while not cluster.state.incidents:
        cluster.after(0.5).beat(step=20, moving=lambda _: False, states="SSTS")
    assert cluster.state.phase is RunPhase.SEARCHING

    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    for node in ("node-0", "node-1", "node-2"):
        cluster.after(0.1).join(node, generation=1, mark=5)
    order = started(cluster.after(0.1).found(15))

    assert order.dismiss == (2,)
    assert order.incident == "inc-1"
    assert cluster.state.incidents[0].rung == "resume from the durable tier"
    assert cluster.state.budgets["hardware"].spent == 1
    cluster.resume()
    assert [incident.open for incident in cluster.state.incidents] == [False, False]


def test_ranks_that_died_with_their_agent_while_no_controller_lived_are_restarted_in_place(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    cluster.lose("node-2")

    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.join("node-0", generation=1, mark=5)
    order = started(cluster.after(0.1).join("node-1", incarnation=2))

    assert order.seats == ("node-0", "node-0", "node-1", "node-1")
    assert order.restore is not None
    assert order.restore.sources == ("node-0",) * 4
    assert cluster.state.incidents[-1].kind == "node-lost"
    assert "came back as incarnation 2" in order.reason
    cluster.resume()
    assert cluster.tick() == []


def test_a_node_whose_agent_was_replaced_before_it_said_a_word_gets_no_seat_twice(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    # Ordered, and perhaps taken up: nobody who knows has lived to tell.
    assert started(cluster.after(0.1).exit(1)).generation == 2
    cluster.after(1).tell(ControllerStarted(at=cluster.at(), incarnation=2))
    cluster.join("node-0", generation=2)

    cluster.after(0.1).join("node-1", incarnation=2)

    assert started(cluster.rest()).generation == 3


def test_a_node_that_missed_its_order_is_told_again_when_it_connects(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.exit(1)

    told = cluster.after(0.3).join("node-1", generation=1, mark=5)

    assert [(type(d), d.node, d.generation) for d in told] == [(CatchUp, "node-1", 2)]
