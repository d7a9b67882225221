"""A controller that takes over says what is known of the time without one, and nothing more."""

from orchestrator.core.decisions import Decision, SearchCheckpoints
from orchestrator.core.events import ControllerStarted
from orchestrator.core.incident import Cause
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.report import report
from tests.conftest import Cluster


def take_over(cluster: Cluster) -> list[Decision]:
    """Have the next controller begin."""
    incarnation = cluster.state.incarnation + 1
    return cluster.tell(ControllerStarted(at=cluster.at(), incarnation=incarnation))


def come_back(cluster: Cluster, *, incarnation: int = 1) -> None:
    """Every node calls again; as another agent if its incarnation is another."""
    for node in sorted(cluster.state.nodes):
        same = incarnation == 1
        generation = cluster.state.generation if same and node in cluster.state.world else 0
        cluster.join(
            node, incarnation=incarnation, generation=generation, mark=5 if generation else 0
        )


def test_training_that_is_seen_to_go_on_was_not_interrupted(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(10)
    take_over(cluster.after(3))
    (incident,) = cluster.state.incidents
    assert incident.reason == "ranks were training; whether they went on is not known yet"
    come_back(cluster)

    cluster.train(30)

    assert incident.reason == "training was not interrupted"
    assert report(cluster.state).ledger[Bucket.LOST_WORK] == 0


def test_ranks_that_died_without_a_controller_cost_the_time_since_they_were_heard(
    cluster: Cluster,
) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.train(1)
    take_over(cluster.after(40))

    come_back(cluster, incarnation=2)
    cluster.found()

    restart, lost = cluster.state.incidents
    assert restart.reason == f"training did not outlive it: {lost.id}"
    assert lost.cause is Cause.UNKNOWN
    assert "while no controller was there to see why" in lost.findings[0].evidence
    assert lost.detected_at - lost.since >= 40
    cluster.resume()
    ledger = report(cluster.state).ledger
    assert ledger[Bucket.DETECT] >= 40
    assert ledger[Bucket.LOST_WORK] < 2


def test_a_node_that_is_back_as_another_died_when_it_was_heard_last(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)

    cluster.after(1).join("node-1", incarnation=2)

    incident = cluster.state.incidents[-1]
    assert incident.cause is Cause.HARDWARE
    assert incident.detected_at - incident.since == 1


def test_a_search_is_asked_again_however_many_controllers_die_before_its_answer(
    cluster: Cluster,
) -> None:
    cluster.start()
    cluster.train(5)
    for node in sorted(cluster.state.nodes):
        cluster.lose(node)
    for node in sorted(cluster.state.nodes):
        cluster.join(node, incarnation=2)
    cluster.rest()
    assert cluster.state.phase is RunPhase.SEARCHING

    for _ in range(3):
        decisions = take_over(cluster.after(0.5))
        assert [d for d in decisions if isinstance(d, SearchCheckpoints)]


def test_time_before_the_first_step_is_startup_however_many_controllers_died(
    cluster: Cluster,
) -> None:
    take_over(cluster.after(1))
    take_over(cluster.after(1))
    cluster.after(1).tick()

    assert report(cluster.state).ledger[Bucket.STARTUP] == 3
