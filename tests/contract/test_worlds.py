"""What every world must do, shown with whole runs of a trainer without torch.

Worlds to come are added to `WORLDS`; a run file and a fault plan mean the same in each of them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.decisions import JudgeCheckpoint
from orchestrator.core.events import Reported, Together
from orchestrator.core.report import Report
from orchestrator.protocol.messages import FaultCarriedOut, Prepared
from tests.runs import Job, steps_job
from tests.simulated import SimulatedJob

pytestmark = pytest.mark.process
WORLDS = ("local", "simulated")
NODES = ["node-0", "node-1"]
LOSING = ("kill-agent", "lose-node", "partition-node")
Start = Callable[..., Job | SimulatedJob]


@pytest.fixture(params=WORLDS)
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    made: list[Job | SimulatedJob] = []

    def make(*faults: dict[str, Any], **changes: Any) -> Job | SimulatedJob:
        # A spare that nobody takes is two processes for nothing.
        lost = any(fault["fault"] in LOSING for fault in faults)
        run = steps_job(**{"nodes__spares": int(lost), **changes})
        if request.param == "simulated":
            return SimulatedJob(run, list(faults))
        one = Job(tmp_path / str(len(made)), run, list(faults))
        (one.root / "lockstep").mkdir(parents=True)
        run["spec"]["trainer"]["options"]["lockstep"] = str(one.root / "lockstep")
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def at(step: int, fault: str, **more: object) -> dict[str, Any]:
    return {"when": {"step": step}, "fault": fault, **more}


def assert_whole(report: Report, steps: int = 60) -> None:
    """Every step is there once, with the loss that the trainer computes for it."""
    assert report.state == "Succeeded", report.reason
    assert report.losses == [(step, 1.0 / step) for step in range(1, steps + 1)]
    assert report.divergences == []
    assert sum(round(s * 1e6) for s in report.ledger.values()) == round(report.wall_s * 1e6)


def carried_out(one: Job | SimulatedJob) -> set[tuple[int, str]]:
    """Return the planned faults that agents say they carried out, and what stood in the way."""
    facts = [entry.event.fact for entry in one.entries() if isinstance(entry.event, Reported)]
    return {(fact.index, fact.problem) for fact in facts if isinstance(fact, FaultCarriedOut)}


def test_an_undisturbed_run_takes_one_generation_and_leaves_nothing(job: Start) -> None:
    one = job()

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert (report.generations, report.incidents, report.controllers) == (1, [], 1)
    assert [c.step for c in report.checkpoints] == [20, 40, 60]
    assert one.leftovers() == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (at(22, "kill-rank", rank=1), "crash"),
        (at(22, "segfault-rank", rank=2), "crash"),
        (at(22, "exit-rank", rank=3), "exception"),
        (at(22, "freeze-rank", rank=0), "hang"),
        (at(22, "spin-rank", rank=0), "hang"),
        (at(22, "spin-rank", rank=3, holdGil=True), "hang"),
        (at(22, "kill-agent", node="node-0"), "node-lost"),
        (at(22, "lose-node", node="node-1"), "node-lost"),
        (at(22, "partition-node", node="node-1", **{"for": "6s"}), "node-silent"),
        (at(22, "kill-controller"), "controller-restart"),
    ],
    ids=lambda value: value["fault"] if isinstance(value, dict) else value,
)
def test_a_fault_is_found_for_what_it_is_and_no_step_is_lost(
    job: Start, fault: dict[str, Any], kind: str
) -> None:
    one = job(fault)

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert [incident.kind for incident in report.incidents] == [kind]
    assert report.false_alarms == 0
    assert [f.found_by for f in report.faults] == ["inc-1"]
    # Whatever was lost, the memory of another node had it.
    assert report.incidents[0].durable_reads == 0
    assert one.leftovers() == []


def test_two_ranks_that_die_at_the_same_moment_are_one_incident_that_names_both(
    job: Start,
) -> None:
    one = job(at(22, "kill-rank", rank=2), at(22, "kill-rank", rank=3))

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert [f.found_by for f in report.faults] == ["inc-1", "inc-1"]
    (incident,) = report.incidents
    assert incident.suspects == ["rank 2", "rank 3", "node-1"]
    assert len(incident.evidence) == 2


def test_of_ranks_of_two_nodes_that_die_at_the_same_moment_each_is_found(job: Start) -> None:
    one = job(at(22, "kill-rank", rank=1), at(22, "kill-rank", rank=2))

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert carried_out(one) == {(0, ""), (1, "")}
    assert None not in [fault.found_by for fault in report.faults]
    assert {incident.kind for incident in report.incidents} == {"crash"}


@pytest.mark.parametrize(
    "fault",
    [
        at(22, "slow-rank", rank=1, share=0.3, **{"for": "1s"}),
        at(15, "slow-disk", node="node-0", delay="100ms", **{"for": "2s"}),
    ],
    ids=lambda fault: fault["fault"],
)
def test_what_only_slows_a_run_down_is_carried_out_and_is_no_incident(
    job: Start, fault: dict[str, Any]
) -> None:
    one = job(fault)

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert [f.description.split()[0] for f in report.faults] == [fault["fault"]]
    assert carried_out(one) == {(0, "")}
    assert (report.generations, report.incidents, report.save_failures) == (1, [], [])
    assert [c.step for c in report.checkpoints] == [20, 40, 60]


def test_a_lost_node_is_replaced_by_the_spare_from_memory_alone(job: Start) -> None:
    one = job(at(33, "lose-node", node="node-0"))

    _, report = one.conduct()

    assert report.rungs == {"start": 1, "swap for a spare": 1}
    assert report.incidents[0].restored_from == "own memory (2 ranks), buddy's memory (2 ranks)"
    assert report.incidents[0].restored_step >= 25


def test_a_node_that_missed_a_generation_comes_back_to_what_that_one_has_done(job: Start) -> None:
    """Cut off, node-1 goes on to step 25; without it that is done again, and continued."""
    one = job(
        at(22, "partition-node", node="node-1", **{"for": "3s"}),
        at(29, "lose-node", node="node-2"),
        trainer__options={"steps": 60, "step_s": 0.2, "save_every": 5, "durable_every": 60},
        checkpoint__everySteps=60,
    )

    _, report = one.conduct()

    assert_whole(report)
    assert report.generations == 3
    restored = one.restored(3)
    assert len(restored) == 4
    ((_, saved_by),) = set(restored)
    assert saved_by == 2


def test_checkpoints_from_before_a_replay_that_came_out_well_are_compute_verified(
    job: Start,
) -> None:
    options = {"steps": 60, "step_s": 0.02, "save_every": 5, "durable_every": 20}
    one = job(trainer__options=options | {"replay_every": 15})

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    judged = [d for entry in one.entries() for d in entry.decisions]
    verdicts = {d.step: d.verdict for d in judged if isinstance(d, JudgeCheckpoint)}
    # Nothing was computed once more after the last step; of the one before, ranks may be done with
    # all steps before anybody has heard of it.
    assert {20} <= verdicts.keys() <= {20, 40}
    assert set(verdicts.values()) == {"compute-verified"}
    assert [c.step for c in report.checkpoints] == [20, 40, 60]


def test_a_loss_of_all_memory_falls_back_to_the_durable_tier(job: Start) -> None:
    one = job(
        at(45, "kill-agent", node="node-0"),
        at(45, "kill-agent", node="node-1"),
        nodes__spares=0,
    )

    _, report = one.conduct()

    assert_whole(report)
    assert report.incidents[0].restored_from.startswith("durable tier")
    assert report.incidents[0].durable_reads > 0


def test_of_two_replicas_one_reads_each_shard_and_the_other_has_it_from_there(
    job: Start,
) -> None:
    one = job(
        at(45, "kill-agent", node="node-0"),
        at(45, "kill-agent", node="node-1"),
        nodes__spares=0,
        parallelism={"dpReplicate": 2, "dpShard": 2},
    )

    _, report = one.conduct()

    assert_whole(report)
    told = "durable tier (2 ranks), and from those who read it there (2 ranks)"
    assert report.incidents[0].restored_from == told
    events = [e.event for e in one.entries() if isinstance(e.event, Reported | Together)]
    said = [e for e in events if isinstance(e.fact, Prepared) and e.fact.durable]
    nodes = [
        node for e in said for node in ([e.node] if isinstance(e, Reported) else e.nodes or NODES)
    ]
    durable, fetched = zip(*((e.fact.durable, e.fact.fetched) for e in said), strict=True)
    assert (set(durable), set(fetched), sorted(nodes)) == ({1}, {1}, NODES)


def test_a_corrupt_newest_checkpoint_is_passed_over_and_said_to_be(job: Start) -> None:
    one = job(
        at(45, "corrupt-shard", node="node-0"),
        at(48, "kill-agent", node="node-0"),
        at(48, "kill-agent", node="node-1"),
        nodes__spares=0,
    )

    _, report = one.conduct()

    assert_whole(report)
    assert report.incidents[0].restored_step == 20
    assert "passed over step 40" in report.incidents[-1].reason


def test_a_short_full_disk_is_ridden_out_by_trying_again(job: Start) -> None:
    one = job(at(15, "full-disk", node="node-0", **{"for": "500ms"}))

    _, report = one.conduct()

    assert_whole(report)
    assert report.incidents == []


def test_a_full_disk_that_lasts_costs_a_checkpoint_and_not_the_run(job: Start) -> None:
    options = {"steps": 100, "step_s": 0.05, "save_every": 5, "durable_every": 20}
    one = job(
        at(15, "full-disk", node="node-0", **{"for": "2500ms"}),
        trainer__steps=100,
        trainer__options=options,
    )

    _, report = one.conduct()

    assert_whole(report, 100)
    assert any("no space" in failure.reason for failure in report.save_failures)
    assert report.incidents == []


def test_a_job_that_refuses_itself_fails_at_once_with_its_own_words(job: Start) -> None:
    one = job(trainer__options={"steps": 60, "refuse": True})

    code, report = one.conduct()

    assert (code, report.state) == (2, "Failed")
    assert "vocabulary is 10, expected 20" in report.reason
    assert report.generations == 1


def test_a_step_that_fails_wherever_it_runs_ends_the_run_with_its_traceback(job: Start) -> None:
    one = job(trainer__options={"steps": 60, "step_s": 0.01, "raise_at": 12})

    code, report = one.conduct()

    assert (code, report.state) == (3, "Failed")
    assert "ArithmeticError" in report.reason
    assert "step 12 does not work out" in report.reason
    assert "Traceback" in report.reason


def test_a_run_without_spares_gives_up_when_it_needs_one_and_says_so(job: Start) -> None:
    one = job(at(12, "lose-node", node="node-1"), nodes__spares=0, recovery={"spareWait": "1s"})

    code, report = one.conduct()

    assert (code, report.state) == (3, "Failed")
    assert "needs 2 nodes and has 1, 0 of 0 spares free" in report.reason
    assert one.leftovers() == []


def long(**more: Any) -> dict[str, Any]:
    """Options of a run that lasts 8 s."""
    return {"steps": 400, "step_s": 0.02, "save_every": 5, "durable_every": 200, **more}


def test_a_node_whose_agent_did_not_run_for_a_while_has_its_seats_again_when_it_does(
    job: Start,
) -> None:
    one = job(
        nodes__spares=0,
        trainer__steps=400,
        trainer__options=long(),
        recovery={"spareWait": "10s"},
    )

    _, report = one.hush("node-1", 3)

    assert_whole(report, 400)
    assert [incident.kind for incident in report.incidents] == ["node-silent"]
    assert report.incidents[0].suspects[-1] == "node-1"
    assert report.rungs == {"start": 1, "restart in place": 1}
    assert one.leftovers() == []


def test_a_spare_whose_agent_did_not_run_for_a_while_is_one_again_when_it_does(
    job: Start,
) -> None:
    one = job(
        at(300, "kill-agent", node="node-1"),
        trainer__steps=400,
        trainer__options=long(),
    )

    _, report = one.hush("node-2", 3)

    assert_whole(report, 400)
    assert [incident.kind for incident in report.incidents] == ["node-lost"]
    assert report.rungs == {"start": 1, "swap for a spare": 1}


def test_a_node_that_is_to_be_free_is_swapped_for_the_spare_and_that_is_paid_by_nobody(
    job: Start,
) -> None:
    one = job(nodes__spares=1, trainer__steps=400, trainer__options=long())

    code, report = one.drain("node-1")

    assert code == 0
    assert_whole(report, 400)
    assert report.rungs == {"start": 1, "planned swap": 1}
    (incident,) = report.incidents
    assert (incident.kind, incident.cause, incident.suspects) == ("planned", "planned", ["node-1"])
    assert not incident.false_alarm
    # Saves are five steps apart, and less than one of these intervals has to be done again.
    assert incident.lost_steps < 5
    assert incident.durable_reads == 0
    assert one.leftovers() == []


def test_a_restore_that_takes_longer_than_any_before_is_not_taken_for_a_hang(job: Start) -> None:
    # detectWithin is 2 s, so form_s is 5 s.
    options = {"steps": 60, "step_s": 0.02, "save_every": 5, "durable_every": 20, "restore_s": 7}
    one = job(at(22, "kill-rank", rank=1), trainer__options=options)

    code, report = one.conduct()

    assert code == 0
    assert_whole(report)
    assert [incident.kind for incident in report.incidents] == ["crash"]
    assert report.generations == 2
    assert report.false_alarms == 0


def test_a_node_without_a_spare_costs_a_replica_until_it_is_back(job: Start) -> None:
    one = job(
        at(40, "lose-node", node="node-1", **{"for": "1s"}),
        nodes={"count": 3, "ranksPerNode": 1, "spares": 0},
        parallelism={"dpReplicate": 3, "dpShard": 1},
        trainer__steps=STEPS_ELASTIC,
        trainer__options={
            "steps": STEPS_ELASTIC,
            "step_s": 0.02,
            # Every copy of a step is made long before the next one is saved.
            "save_every": 25,
            "durable_every": 100,
        },
        checkpoint__memoryEverySteps=25,
        recovery={"minReplicas": 2},
    )

    code, report = one.conduct()

    assert code == 0
    assert_whole(report, STEPS_ELASTIC)
    assert report.controllers == 1
    assert report.rungs == {"grow back": 1, "shrink": 1, "start": 1}
    assert (report.replicas, report.replicas_least) == (3, 2)
    assert [(i.kind, i.restored_from) for i in report.incidents] == [
        ("node-lost", "own memory (2 ranks)"),
        ("grow-back", "own memory (2 ranks), another replica's copy (1 ranks)"),
    ]
    assert [i.ledger.get("lost_capacity", 0.0) > 0 for i in report.incidents] == [True, False]
    assert (report.false_alarms, report.replicas_differ) == (0, [])
    assert one.leftovers() == []


STEPS_ELASTIC = 500
