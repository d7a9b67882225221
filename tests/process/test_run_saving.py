"""Whole runs in which memory or disk fails at the moment at which it is needed most."""

import copy
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core import journal
from orchestrator.core.decisions import SetCadence, StartGeneration
from orchestrator.core.events import CheckpointJudged, Reported
from orchestrator.core.report import Report
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Rank, Step
from orchestrator.protocol.messages import Holding, ShardsHeld
from orchestrator.worlds.memory import memory_of
from tests import tiny
from tests.programs.played import flip_a_bit, wait_for
from tests.runs import Job, steps_job

pytestmark = pytest.mark.process
Start = Callable[..., Job]
UNLOST: dict[str, Any] = copy.deepcopy(tiny.RUN)
"""The tiny Llama where no node is lost: a spare would only import torch."""
UNLOST["spec"]["nodes"]["spares"] = 0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Start]:
    made: list[Job] = []

    def make(*faults: dict[str, Any], spares: int = 0, **options: Any) -> Job:
        (tmp_path / "lockstep").mkdir()
        options = {"steps": 60, "lockstep": str(tmp_path / "lockstep"), **options}
        run = steps_job(nodes__spares=spares, trainer__options=options)
        made.append(Job(tmp_path, run, list(faults)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def at(step: int, fault: str, **more: object) -> dict[str, Any]:
    return {"when": {"step": step}, "fault": fault, **more}


def test_a_disk_that_is_full_when_the_run_ends_is_waited_for_and_not_the_end_of_it(
    job: Start,
) -> None:
    one = job(
        at(50, "full-disk", node="node-0", **{"for": "4s"}),
        step_s=0.02,
        durable_every=20,
    )

    code, report = one.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.checkpoints[-1].step == 60
    (reason,) = [failure.reason for failure in report.save_failures if failure.step == 60]
    assert "no space" in reason
    assert report.incidents == []
    assert one.leftovers() == []


def test_two_nodes_lost_between_two_saves_cost_no_look_at_the_durable_tier(job: Start) -> None:
    """What the first one held for the second is copied again as soon as training goes on."""
    one = job(
        at(24, "lose-node", node="node-0"),
        at(34, "lose-node", node="node-1"),
        spares=2,
        step_s=0.05,
        save_every=20,
        durable_every=60,
    )

    code, report = one.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.rungs == {"start": 1, "swap for a spare": 2}
    # Nothing is committed before the last step: without memory it would start over.
    assert [checkpoint.step for checkpoint in report.checkpoints] == [60]
    assert [incident.restored_step for incident in report.incidents] == [20, 20]
    for incident in report.incidents:
        assert incident.restored_from == "own memory (2 ranks), buddy's memory (2 ranks)"
    assert report.losses == [(step, 1.0 / step) for step in range(1, 61)]
    assert report.divergences == []
    assert one.leftovers() == []


def test_a_damaged_copy_of_a_dead_rank_costs_nothing_that_its_buddy_still_holds(
    job: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    steps = {"steps": 150, "save_every": 100, "durable_every": 150}
    one = job(**steps, step_s=0.005, gate_at=110, gate=str(gate))
    one.run["spec"]["checkpoint"] = {"everySteps": 1000, "memoryEverySteps": 100}
    one.run["spec"]["trainer"]["steps"] = 150
    # Who waits at the gate for as long as a busy machine takes is not to be taken for hanging.
    one.run["spec"]["detection"]["detectWithin"] = "120s"
    one.start()
    memory = memory_of(one.folder)
    wait_for(lambda: list((memory / "node-0").glob("copy-00002-100-*")), 60)
    wait_for(lambda: all(held(one, node) >= ALL_AT_100 for node in ("node-0", "node-1")), 60)

    flip_a_bit(memory / "node-1", rank=2)
    os.kill(pid_of(one, 2), signal.SIGKILL)
    gate.touch()
    code = one.finish(120)

    report = one.report()
    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert {incident.restored_step for incident in report.incidents} == {100}
    assert [incident.restored_from for incident in report.incidents] == ["own memory (4 ranks)"]
    told = one.holdfast("describe", "incident", report.incidents[0].id).stdout
    assert re.search(
        r"node-1 has the state of step 100 .* rank 2 1 chunk, .* came from node-0", told
    )
    assert report.losses == [(step, 1.0 / step) for step in range(1, 151)]
    assert one.leftovers() == []


ALL_AT_100 = {Holding(Rank(rank), Step(100)) for rank in range(4)}


def held(one: Job, node: str) -> set[Holding]:
    """Return what a node last said that it holds, verified: of its own ranks and of others."""
    said = [e.event for e in one.entries() if isinstance(e.event, Reported)]
    facts = [e.fact for e in said if e.node == node and isinstance(e.fact, ShardsHeld)]
    return set(facts[-1].holdings) if facts else set()


def pid_of(one: Job, rank: int) -> int:
    """Return the process that took the seat of a rank first, from what it printed."""
    log = (one.folder.root / "logs" / f"rank-{rank:05d}.log").read_text()
    (pid,) = re.findall(rf"^pid (\d+) generation 1 rank {rank}$", log, re.MULTILINE)
    return int(pid)


def test_a_tier_that_is_slow_on_one_node_gets_fewer_steps_and_each_of_them_whole(
    tmp_path: Path,
) -> None:
    """Ranks that each skipped what they are too slow for would have hardly a step in common."""
    changes = {
        "parallelism": {"dpReplicate": 1, "dpShard": 4},
        "checkpoint": {"everySteps": 2, "memoryEverySteps": 2},
    }
    run = UNLOST | {"spec": UNLOST["spec"] | changes}
    slow = at(1, "slow-disk", node="node-1", delay="150ms", **{"for": "60s"})
    one = Job(tmp_path, run, [slow])
    try:
        code, report = one.conduct("--quiet", timeout_s=120)
        words = one.folder.rank_log(0).read_text()
    finally:
        one.close()

    assert code == 0, report.reason
    assert "is not made durable" in words
    # How many there are is the machine's affair; that none but the last is whole would be ours.
    assert len(report.checkpoints) > 2
    assert report.save_failures == []


def test_a_tier_that_failed_for_a_while_gets_checkpoints_again_afterwards(tmp_path: Path) -> None:
    """Each rank hears that its shard was given up, and does not wait for it for ever."""
    changes = {
        "parallelism": {"dpReplicate": 1, "dpShard": 4},
        "trainer": UNLOST["spec"]["trainer"] | {"steps": 120},
        "checkpoint": {"everySteps": 10, "memoryEverySteps": 2},
    }
    run = UNLOST | {"spec": UNLOST["spec"] | changes}
    one = Job(tmp_path, run, [at(29, "full-disk", node="node-0", **{"for": "2s"})])
    try:
        code, report = one.conduct("--quiet", timeout_s=120)
    finally:
        one.close()

    assert code == 0, report.reason
    assert report.save_failures
    assert len([c for c in report.checkpoints if 30 < c.step < 120]) >= 2


def test_a_run_that_chooses_how_often_it_saves_goes_over_to_it_together_and_keeps_its_bits(
    tmp_path: Path, twin: Report
) -> None:
    auto = {"every": "auto", "memoryEveryMin": "100ms", "memoryEveryMax": "150ms", "everyMin": "1s"}
    checkpoint = {"everySteps": 21, "memoryEverySteps": 7} | auto
    run = UNLOST | {"spec": UNLOST["spec"] | {"checkpoint": checkpoint}}
    one = Job(tmp_path, run, [at(38, "kill-rank", rank=3)])
    try:
        code, report = one.conduct("--quiet", timeout_s=120)
        entries = journal.read(one.folder.journal.read_bytes()).entries
    finally:
        one.close()

    assert code == 0, report.reason
    orders = [d for entry in entries for d in entry.decisions]
    restarted = next(o for o in orders if isinstance(o, StartGeneration) and o.restore)
    before = orders[: orders.index(restarted)]
    ordered = {order.cadence.memory for order in before if isinstance(order, SetCadence)}
    assert restarted.cadence is not None
    assert restarted.cadence.memory in ordered
    # Only steps that every rank has saved can be restored, so all of them have heard of one of
    # those; a machine that becomes busier is told another one meanwhile.
    assert restarted.restore is not None
    assert 7 not in ordered
    assert any(restarted.restore.step % memory == 0 for memory in ordered)
    tiny.assert_same_bits(report, twin, "a cadence of its own")


@pytest.mark.parametrize(
    ("fault", "said"),
    [("full-disk", "no space left"), ("read-only-disk", "Read-only file system")],
)
def test_a_tier_that_takes_nothing_for_the_rest_of_a_run_costs_its_saves_and_no_bit(
    tmp_path: Path, twin: Report, fault: str, said: str
) -> None:
    """The last save waits until somebody has seen to the tier, as long as the run waits for it."""
    broken = [at(12, fault, node=node, **{"for": "8s"}) for node in ("node-0", "node-1")]
    one = Job(tmp_path, UNLOST, broken)
    try:
        code, report = one.conduct("--quiet", timeout_s=120)
        words = one.holdfast("describe", "run").stdout
    finally:
        one.close()

    assert code == 0, report.reason
    assert report.checkpoints[-1].step == 40
    kept = {checkpoint.step for checkpoint in report.checkpoints}
    assert not {20, 30} & kept
    failed = {failure.step for failure in report.save_failures if said in failure.reason}
    # On a busy machine the save of step 10 fails as well, and that of step 20 waits for it; or no
    # rank has a slot for it and it is left out, which is no failure, and 20 is the first one.
    told = {failure.step for failure in report.save_failures}
    first = 20 if 10 in kept or 10 not in told else 10
    assert failed >= {first, 40}
    assert "step 40: node-0: Storage" in words
    assert said in words
    tiny.assert_nothing_broke(report)
    tiny.assert_same_bits(report, twin, fault)


def test_replicas_of_a_real_run_agree_and_its_checkpoints_are_verified_by_that(
    tmp_path: Path,
) -> None:
    one = Job(tmp_path, UNLOST)
    try:
        code, report = one.conduct("--quiet", timeout_s=150)
    finally:
        one.close()
    entries = one.entries()

    assert code == 0, report.reason
    assert report.save_failures == []
    judged = [e.event for e in entries if isinstance(e.event, CheckpointJudged)]
    verified = {event.step for event in judged if event.verdict is Verdict.STATE_VERIFIED}
    # How many there are is the machine's affair; of the last one the run may be over before its
    # verdict is on record.
    committed = {checkpoint.step for checkpoint in report.checkpoints} - {tiny.STEPS}
    assert committed
    assert committed <= verified
    assert {event.verdict for event in judged} <= {Verdict.STATE_VERIFIED, Verdict.BYTES_VERIFIED}
