"""What becomes of a rank whose state went bad and was given what its twins hold."""

from collections.abc import Sequence

import pytest

from orchestrator.cli import story
from orchestrator.cli.describe import checkpoint_lines
from orchestrator.cli.history import History
from orchestrator.cli.incident import incident_lines
from orchestrator.core.decisions import Decision, JudgeDevice
from orchestrator.core.events import Compared, CopiesHeld, Reported
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.report import report
from orchestrator.core.standing import Act, Proof, Standing
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import Holding, ShardsHeld, StateDiverged, StateRepaired
from tests.fleet import Fleet, begun, starts

SECONDS = 0.3


@pytest.fixture
def fleet() -> Fleet:
    found = begun(Fleet())
    found.train(12)
    found.hold(12)
    found.after(1.0)
    return found


def repaired(
    fleet: Fleet,
    rank: int = 2,
    *,
    source: int = 0,
    seconds: float = SECONDS,
    step: int = 13,
    problem: str = "",
    count: int = 9,
    begun: bool = False,
    node: str = "node-0",
) -> list[Decision]:
    names = tuple(f"weights of layers.{n}" for n in range(min(count, 8)))
    fact = StateRepaired(
        generation=fleet.state.generation,
        step=Step(step),
        ranks=() if problem else (Rank(rank),),
        source=Rank(source),
        tensors=() if problem else names,
        count=0 if problem else count,
        seconds=seconds,
        problem=problem,
        begun=begun,
    )
    return fleet.say(node, fact)


def diverged(fleet: Fleet) -> None:
    fact = StateDiverged(
        generation=fleet.state.generation,
        step=Step(12),
        since=Step(11),
        nodes=(NodeId("node-1"),),
        ranks=(Rank(2),),
        evidence="digests differ",
        proven=True,
    )
    fleet.tell(Compared(at=fleet.at(), fact=fact))


def verdicts(decisions: Sequence[Decision]) -> list[tuple[str, Act, Proof]]:
    orders = [d for d in decisions if isinstance(d, JudgeDevice)]
    return [(order.device.serial, order.act, order.proof) for order in orders]


def test_a_repair_is_an_incident_that_is_over_and_cost_one_step_and_no_restart(
    fleet: Fleet,
) -> None:
    before = fleet.state.generation

    decisions = repaired(fleet)

    assert verdicts(decisions) == [("m1", Act.SUSPECTED, Proof.NONE)]
    assert fleet.keep(decisions)
    assert (fleet.state.generation, fleet.state.phase) == (before, RunPhase.TRAINING)
    (incident,) = fleet.state.incidents
    assert (incident.kind, incident.rung, incident.open) == (
        "state-repaired",
        "repair by copy",
        False,
    )
    assert (incident.ranks, incident.nodes) == ((2,), ("node-1",))
    assert fleet.state.ledger.totals(incident.id)[Bucket.LOST_WORK] == SECONDS * 1e6
    assert (fleet.where("m1"), fleet.state.quarantined) == (Standing.SUSPECT, {})
    assert all(budget.spent == 0 for budget in fleet.state.budgets.values())
    (told,) = report(fleet.state).incidents
    assert (told.lost_steps, told.false_alarm) == (1, False)


def test_who_asks_is_told_what_was_done_about_it_and_what_that_cost(fleet: Fleet) -> None:
    repaired(fleet)

    text = "\n".join(incident_lines(0, fleet.state, History()))
    assert "rank 2 did not hold what most do of weights of layers.0, weights of layers.1" in text
    assert "weights of layers.7 and 1 more" in text
    assert "it was given 9 tensors of rank 0, and digests of all are the same" in text
    assert "nothing was paid" in text
    assert "1 step done again" in text
    assert "lost_work: steps that are done again" in text


def test_two_ranks_that_tell_the_same_are_one_repair(fleet: Fleet) -> None:
    fleet.keep(repaired(fleet))

    assert verdicts(repaired(fleet)) == []
    assert (len(fleet.state.incidents), len(fleet.state.repairs)) == (1, 1)


def test_a_rank_that_updated_wrongly_and_saw_it_itself_is_a_repair_like_others(
    fleet: Fleet,
) -> None:
    decisions = [
        *repaired(fleet, rank=2, source=2, count=1, seconds=0.0),
        *repaired(fleet, rank=1, source=1, count=0, seconds=0.0),
    ]

    assert verdicts(decisions) == [
        ("m1", Act.SUSPECTED, Proof.NONE),
        ("m0", Act.SUSPECTED, Proof.NONE),
    ]
    first, second = fleet.state.incidents
    assert first.findings[0].evidence == (
        "in step 13, rank 2 came to other bits when it updated a second time: weights of layers.0"
    )
    assert (first.rung, second.rung) == ("update computed again", "update computed again")
    assert "of which a third time shows that the first was right" in second.findings[0].evidence
    assert "what came out twice is kept" in first.reason
    assert (first.lost_steps, sum(fleet.state.ledger.totals(first.id).values())) == (0, 0)
    assert fleet.state.holders(Step(12), Rank(2)) == ("node-0", "node-1"), "it is sound"


def test_a_digest_that_differed_alone_is_told_as_that(fleet: Fleet) -> None:
    repaired(fleet, count=0)

    (incident,) = fleet.state.incidents
    assert "other digests of its state or gradient than most" in incident.findings[0].evidence
    assert "nothing had to be copied" in incident.reason
    assert incident.rung == "redo of the step"


def test_a_device_under_suspicion_that_is_caught_again_is_convicted_and_swapped_when_it_suits(
    fleet: Fleet,
) -> None:
    fleet.keep(repaired(fleet))
    fleet.train(3)

    decisions = repaired(fleet, step=16)

    assert verdicts(decisions) == [("m1", Act.CONVICTED, Proof.VOTE)]
    fleet.keep(decisions)
    assert fleet.where("m1") is Standing.QUARANTINED
    assert "node-1" in fleet.state.drains, "nothing of it is wrong: it may choose the moment"
    fleet.train(1)
    fleet.hold(16)
    fleet.train(1)
    order = starts(fleet)[-1]
    assert order.seats == ("node-0", "node-0", "node-2", "node-2")
    assert order.restore is not None
    assert order.restore.step == 16
    assert fleet.state.incidents[-1].rung == "planned swap"


def test_a_rank_that_sees_itself_again_that_it_updated_wrongly_is_convicted_of_what_it_saw(
    fleet: Fleet,
) -> None:
    fleet.keep(repaired(fleet, rank=2, source=2, count=1, seconds=0.0))
    fleet.train(3)

    decisions = repaired(fleet, rank=2, source=2, count=1, seconds=0.0, step=16)

    assert verdicts(decisions) == [("m1", Act.CONVICTED, Proof.SELF_CHECK)]


def test_a_death_in_the_midst_of_a_repair_says_so_and_leaves_the_device_a_suspect(
    fleet: Fleet,
) -> None:
    assert repaired(fleet, begun=True) == []
    assert repaired(fleet, begun=True, node="node-1") == [], "two of them tell"
    assert fleet.state.holders(Step(12), Rank(2)) == ()
    assert fleet.state.incidents == []

    decisions = fleet.exit(0, step=12)

    (incident,) = fleet.state.incidents
    assert incident.kind == "crash"
    told = [note.text for note in incident.timeline]
    assert any("it was being given that of rank 0, and nobody told the end" in t for t in told)
    assert verdicts(decisions) == [("m1", Act.SUSPECTED, Proof.NONE)]
    assert starts(fleet)[-1].restore.staged_as == (0, 1, 0, 3)  # type: ignore[union-attr]


def test_a_repair_that_came_to_its_end_is_no_part_of_what_breaks_later(fleet: Fleet) -> None:
    repaired(fleet, begun=True)
    fleet.keep(repaired(fleet))
    repaired(fleet, begun=True, node="node-1")

    fleet.exit(0, step=12)

    assert len(fleet.state.incidents) == 2
    told = [note.text for note in fleet.state.incidents[-1].timeline]
    assert not any("nobody told the end" in text for text in told)


def test_devices_of_many_nodes_that_are_caught_again_are_suspected_and_no_more(
    fleet: Fleet,
) -> None:
    fleet.keep(repaired(fleet))
    fleet.train(1)
    fleet.keep(repaired(fleet, 0, source=3, step=14))
    fleet.train(1)

    assert verdicts(repaired(fleet, step=15)) == []
    assert fleet.where("m1") is Standing.SUSPECT


def test_nobody_starts_from_what_the_rank_had_staged_after_the_step_before(fleet: Fleet) -> None:
    assert fleet.state.holders(Step(12), Rank(2)) == ("node-0", "node-1")

    repaired(fleet, step=13)

    assert fleet.state.holders(Step(12), Rank(2)) == ()
    assert fleet.state.holders(Step(12), Rank(3)) == ("node-0", "node-1")
    fleet.hold(12)
    assert fleet.state.holders(Step(12), Rank(2)) == (), "also not if it is told again"
    told = "\n".join(checkpoint_lines(Step(12), fleet.state, History()))
    assert "what rank 2 staged: its state may have been wrong before that" in told


def test_a_copy_of_it_that_was_under_way_is_not_counted_on_either_until_the_step_is_done_again(
    fleet: Fleet,
) -> None:
    repaired(fleet, step=13)

    fleet.hold(11)
    fleet.hold(12)
    generation = fleet.state.generation
    fleet.tell(CopiesHeld(at=fleet.at(), generation=generation, step=Step(12), copied=True))

    assert fleet.state.holders(Step(12), Rank(2)) == ()
    fleet.train(1)
    fleet.exit(2, step=13)
    order = starts(fleet)[-1]
    assert order.restore is not None
    assert order.restore.step == 12
    assert order.restore.staged_as == (0, 1, 0, 3), "its twin's, wherever it is"
    fleet.resume()
    assert fleet.state.holders(Step(12), Rank(2)) == ()


def test_what_it_staged_is_as_good_as_any_once_the_step_was_computed_anew(fleet: Fleet) -> None:
    repaired(fleet, step=13)
    diverged(fleet)
    fleet.found()
    assert starts(fleet)[-1].restore is None
    fleet.resume()
    fleet.train(12)

    fleet.hold(12)

    assert fleet.state.holders(Step(12), Rank(2)) != ()


def test_a_node_that_has_it_still_does_not_take_it_for_what_the_durable_tier_has(
    fleet: Fleet,
) -> None:
    repaired(fleet, step=13)
    own = tuple(Holding(Rank(rank), Step(12)) for rank in (2, 3))
    fleet.say("node-1", ShardsHeld(generation=fleet.state.generation, holdings=own))
    fleet.lose("node-0")
    fleet.found(12)

    order = starts(fleet)[-1]
    assert order.restore is not None
    assert (order.restore.step, order.restore.sources) == (12, ("", "node-1", "node-2", ""))
    # Nobody takes what rank 2 staged, and it takes what rank 0 reads.
    assert order.restore.staged_as == (0, 3, 0, 3)


def test_an_incident_says_why_state_that_differed_was_not_repaired(fleet: Fleet) -> None:
    assert repaired(fleet, problem="rank 2 was repaired in step 9 already") == []
    diverged(fleet)

    (incident,) = fleet.state.incidents
    assert incident.kind == "silent-corruption"
    assert incident.findings[0].evidence.endswith(
        "is the last that is known to be good; not repaired: rank 2 was repaired in step 9 already"
    )


def test_repairs_are_told_in_words(fleet: Fleet) -> None:
    repaired(fleet)
    repaired(fleet, step=14, begun=True)
    repaired(fleet, step=14, problem="no majority")

    told = [
        story.words(entry.event)
        for entry in fleet.entries
        if isinstance(entry.event, Reported) and isinstance(entry.event.fact, StateRepaired)
    ]
    assert "node-0: before step 13 moved anything, rank 2 did not hold what most do" in told[0]
    assert told[1].endswith("; it is about to be given that of rank 0")
    assert told[2] == "node-0: state differs before step 14, and stays so: no majority"
