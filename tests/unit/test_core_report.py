import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.events import CheckpointFound, ControllerStarted
from orchestrator.core.phases import RunPhase
from orchestrator.core.report import INFERRED, SHOWS_AS, WITNESSED, Report, losses_digest, report
from orchestrator.faults.catalogue import CATALOGUE
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import Prepared
from storage.digest import combine, render
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import SHORT, commit, inject, killed_rank, raising, succeeded


def freeze(cluster: Cluster, rank: int) -> None:
    """Rank `rank` stands still, stopped, until the controller does something about it."""
    began = cluster.state.generation
    states = "".join("T" if r == rank else "S" for r in range(4))
    step = cluster.state.reached_step
    while cluster.state.generation == began and cluster.now < 1000:
        cluster.after(0.5).beat(step=step, moving=lambda _: False, states=states)


def still(cluster: Cluster) -> None:
    """Nobody moves, and nobody stands out."""
    began = cluster.state.generation
    step = cluster.state.reached_step
    while cluster.state.generation == began and cluster.now < 1000:
        cluster.after(0.5).beat(step=step, moving=lambda _: False)


def training() -> Cluster:
    cluster = Cluster()
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    return cluster


def test_the_report_of_a_finished_run_has_the_shape_that_tools_rely_on() -> None:
    told = msgspec.to_builtins(report(succeeded().state))

    assert told["state"] == "Succeeded"
    assert told["reason"].startswith("all 20 steps are done")
    assert told["final_step"] == told["steps"] == 20
    assert [step for step, _ in told["losses"]] == list(range(1, 21))
    assert told["generations"] == told["generation"] == 2
    assert told["controllers"] == 1
    assert told["rungs"] == {"start": 1, "swap for a spare": 1}
    assert 0 < told["ettr"] < 1
    (incident,) = told["incidents"]
    assert {
        "id": "inc-1",
        "kind": "node-lost",
        "cause": "hardware",
        "suspects": ["rank 2", "rank 3", "node-1"],
        "detected_after_s": pytest.approx(0.1),
        "decided_after_s": pytest.approx(0.1),
        "first_step_after_s": pytest.approx(0.35),
        "rung": "swap for a spare",
        "lost_steps": 2,
    }.items() <= incident.items()
    assert told["false_alarms"] == 0


def test_a_report_says_how_gradients_were_added_up_if_it_knows() -> None:
    told = [
        report(Cluster(runfiles.text(trainer=trainer)).state).reduction
        for trainer in ({}, {"reduction": "deterministic"}, {"entrypoint": "mine:main"})
    ]

    assert told == ["fast", "deterministic", ""]


def test_a_report_survives_its_own_json() -> None:
    told = report(killed_rank().state)

    assert msgspec.json.decode(msgspec.json.encode(told), type=Report) == told


def test_the_ledger_sums_to_the_wall_clock_in_whole_microseconds() -> None:
    for cluster in (killed_rank(), raising(), succeeded(), Cluster()):
        told = report(cluster.state)
        micros = [round(seconds * 1e6) for seconds in told.ledger.values()]
        assert sum(micros) == round(told.wall_s * 1e6)


LANES = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(LANES, LANES), min_size=2, max_size=2))
def test_the_state_digest_is_that_of_the_storage_and_counts_each_shard_once(
    shards: list[tuple[int, int]],
) -> None:
    both = {0: shards[0], 1: shards[1], 2: shards[0], 3: shards[1]}
    first = {0: shards[0], 1: shards[1], 2: (0, 0), 3: (0, 0)}

    for lanes in (both, first):
        told = report(succeeded(lanes).state)
        assert told.final_state_digest == render(combine(shards))
        assert told.replicas_differ == []


def test_a_replica_that_ends_in_another_state_is_named() -> None:
    told = report(succeeded({0: (1, 2), 1: (3, 4), 2: (1, 2), 3: (3, 5)}).state)

    assert told.replicas_differ == [3]


def test_with_a_pipeline_the_replicas_of_each_stage_repeat_each_other() -> None:
    run = SHORT.replace("dpShard: 2", "pp: 2")
    lanes = {0: (1, 2), 1: (3, 4), 2: (1, 2), 3: (3, 4)}

    told = report(succeeded(lanes, run).state)
    other = report(succeeded({**lanes, 3: (1, 2)}, run).state)

    assert told.final_state_digest == render((4, 6))
    assert (told.replicas_differ, other.replicas_differ) == ([], [3])


def test_there_is_no_state_digest_before_every_rank_is_done() -> None:
    assert report(killed_rank().state).final_state_digest is None


def test_the_losses_digest_sees_every_bit_every_step_and_no_number() -> None:
    losses: list[tuple[Step, float | None]] = [(Step(1), 2.0), (Step(2), 1.5)]
    others: list[list[tuple[Step, float | None]]] = [
        [(Step(1), 2.0), (Step(2), math.nextafter(1.5, 2))],
        [(Step(1), 2.0), (Step(3), 1.5)],
        [(Step(1), 2.0), (Step(2), None)],
        [(Step(1), 2.0)],
        [],
    ]

    digests = {losses_digest(other) for other in [losses, *others]}

    assert len(digests) == 1 + len(others)
    assert losses_digest(list(losses)) == losses_digest(losses)


def test_steps_of_a_lineage_that_was_rolled_back_are_no_part_of_the_result() -> None:
    cluster = training()
    cluster.train(3)
    cluster.exit(1, step=23)

    told = report(cluster.state)

    assert told.final_step == 20
    assert told.losses[-1][0] == 20


def test_a_step_that_nobody_reported_is_named() -> None:
    cluster = training()
    cluster.after(0.1).beat(step=22, report=True)

    assert report(cluster.state).losses_missing == [21]


def second_life() -> Cluster:
    """A run that continued from step 60 of a former life, whose last generation was the third."""
    cluster = Cluster()
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)
    cluster.tell(
        CheckpointFound(at=cluster.at(), step=Step(60), epoch=Generation(3), key="commits/60")
    )
    cluster.resume()
    return cluster


def test_steps_of_a_former_life_are_not_counted_as_missing() -> None:
    cluster = second_life()
    assert report(cluster.state).losses_missing == []

    cluster.train(5)
    cluster.after(0.1).beat(step=67, report=True)

    assert report(cluster.state).losses_missing == [66]


def test_a_checkpoint_of_this_life_does_not_excuse_what_this_life_did_not_report() -> None:
    cluster = second_life()
    cluster.after(0.1).beat(step=62, report=True)
    cluster.train(38)
    commit(cluster, 100)
    cluster.train(20)
    cluster.exit(1, step=120)
    cluster.tell(
        CheckpointFound(
            at=cluster.at(), step=Step(100), epoch=cluster.state.generation, key="commits/100"
        )
    )
    cluster.resume()

    told = report(cluster.state)

    assert (told.generations, told.final_step) == (2, 100)
    assert told.losses_missing == [61]


def test_the_number_of_controllers_counts_every_successor() -> None:
    cluster = training()
    for incarnation in (2, 3):
        cluster.tell(ControllerStarted(at=cluster.after(1).at(), incarnation=incarnation))

    told = report(cluster.state)

    assert told.controllers == 3
    assert [i.kind for i in told.incidents] == ["controller-restart"] * 2
    assert told.false_alarms == 0


# Ground truth ---------------------------------------------------------------------------------


def test_a_planned_fault_is_found_by_the_incident_that_names_its_target() -> None:
    told = report(killed_rank().state)

    (fault,) = told.faults
    assert (fault.found_by, fault.found_after_s) == ("inc-1", pytest.approx(0.02))
    assert told.incidents[0].faults == [0]


def test_a_hang_with_nothing_injected_is_a_false_alarm() -> None:
    cluster = training()
    freeze(cluster, 2)

    told = report(cluster.state)

    assert (told.false_alarms, told.incidents[0].false_alarm) == (1, True)


def test_a_hang_of_the_rank_that_was_frozen_is_none() -> None:
    cluster = training()
    inject(cluster, 0, "freeze-rank rank 2 at step 20", "rank 2", "node-1")
    freeze(cluster, 2)

    assert report(cluster.state).false_alarms == 0


def test_a_hang_that_names_a_healthy_rank_is_a_false_alarm_whatever_else_is_broken() -> None:
    cluster = training()
    inject(cluster, 0, "freeze-rank rank 2 at step 20", "rank 2", "node-1")
    freeze(cluster, 0)

    told = report(cluster.state)

    assert told.false_alarms == 1
    assert told.faults[0].found_by is None


def test_a_hang_that_names_nobody_is_explained_by_a_fault_that_shows_as_a_hang() -> None:
    cluster = training()
    inject(cluster, 0, "spin-rank rank 2 at step 20", "rank 2", "node-1")
    still(cluster)

    assert report(cluster.state).false_alarms == 0


def test_a_fault_explains_one_incident_and_not_the_next() -> None:
    cluster = training()
    inject(cluster, 0, "freeze-rank rank 2 at step 20", "rank 2", "node-1")
    freeze(cluster, 2)
    cluster.resume()
    cluster.train(5)
    freeze(cluster, 2)

    assert [i.false_alarm for i in report(cluster.state).incidents] == [False, True]


def test_a_fault_that_comes_after_an_incident_does_not_explain_it() -> None:
    cluster = training()
    freeze(cluster, 2)
    cluster.after(0.1)
    inject(cluster, 0, "freeze-rank rank 2 at step 20", "rank 2", "node-1")

    assert report(cluster.state).false_alarms == 1


def test_a_slow_disk_explains_no_hang() -> None:
    cluster = training()
    inject(cluster, 0, "slow-disk node-1 at step 20", "node-1", "node-1")
    still(cluster)

    assert report(cluster.state).false_alarms == 1


def test_a_process_that_died_unplanned_is_no_false_alarm() -> None:
    assert report(raising().state).false_alarms == 0


def test_two_faults_are_both_found_by_the_incident_that_gathers_them() -> None:
    cluster = training()
    cluster.lose("node-2")
    inject(cluster, 0, "lose-node node-1 at step 20", "node-1", "node-1")
    inject(cluster, 1, "kill-rank rank 0 at step 20", "rank 0", "node-0")
    cluster.after(0.01).lose("node-1")
    cluster.after(0.01).exit(0, step=20)

    assert [fault.found_by for fault in report(cluster.state).faults] == ["inc-1", "inc-1"]


def test_reads_of_the_durable_tier_are_charged_to_their_incident_once() -> None:
    cluster = training()
    cluster.train(40)
    commit(cluster, 50)
    cluster.exit(1, step=60)
    assert cluster.state.phase is RunPhase.SEARCHING
    cluster.tell(
        CheckpointFound(at=cluster.at(), step=Step(50), epoch=Generation(1), key="k", reads=7)
    )
    fact = Prepared(
        generation=Generation(2), step=Step(50), own=0, fetched=0, durable=2, reads=3, seconds=0.1
    )
    for node in ("node-0", "node-1", "node-1"):  # said again on another connection
        cluster.say(node, fact)
    cluster.resume()
    cluster.say("node-1", fact)

    assert [incident.durable_reads for incident in report(cluster.state).incidents] == [13]


def test_a_recovery_from_memory_reads_nothing() -> None:
    assert [incident.durable_reads for incident in report(killed_rank().state).incidents] == [0]


def test_every_fault_of_the_catalogue_is_known_to_the_report() -> None:
    assert set(SHOWS_AS) == set(CATALOGUE)


def test_every_kind_of_finding_is_either_witnessed_or_must_be_explained() -> None:
    shown = set().union(*SHOWS_AS.values())
    assert shown <= WITNESSED | INFERRED
    assert not WITNESSED & INFERRED


def test_an_empty_run_has_a_report() -> None:
    told: Any = report(Cluster().state)

    assert (told.state, told.wall_s, told.ettr, told.losses) == ("Gathering", 0.0, 0.0, [])
