"""A real run notices by itself that bits of its state flipped, and mends that or goes back."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.events import Compared, Reported
from orchestrator.core.report import Report
from orchestrator.core.standing import Act
from orchestrator.protocol.messages import Joined, StateRepaired
from orchestrator.worlds.devices import DeviceLedger
from storage.local import LocalStore
from tests import runfiles, tiny
from tests.runs import Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]
STEPS = 40


def run(name: str, *, spares: int = 1, **detection: Any) -> dict[str, Any]:
    return runfiles.fields(
        name,
        nodes={"count": 3, "ranksPerNode": 1, "spares": spares},
        parallelism={"dpReplicate": 3, "dpShard": 1},
        trainer={"model": tiny.MODEL, "steps": STEPS, "seqLen": 32, "globalBatch": 3},
        checkpoint={"everySteps": 50, "memoryEverySteps": 5},
        detection={"detectWithin": "3s", "digestShare": 1.0, "replayShare": 1.0, **detection},
    )


FLIP = {
    "when": {"step": 8},
    "fault": "flip-bit",
    "rank": 1,
    "state": "exp_avg",
    "element": 5,
    "bit": 3,
    "atStep": 18,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return tiny.undisturbed(tmp_path_factory.mktemp("twin"), run("t"))


def disturbed(root: Path, fault: dict[str, Any], **changes: Any) -> tuple[Job, Report]:
    """Run it with a fault; return the run and what it came to."""
    slow = {"when": {"step": 2}, "fault": "slow-rank", "rank": 0, "share": 0.3}
    one = Job(root, run("d", **changes), [slow, fault])
    try:
        code, report = one.conduct("--quiet", timeout_s=120)
    finally:
        one.close()
    assert code == 0, report.reason
    return one, report


def test_a_bit_that_flips_in_one_of_three_replicas_is_mended_and_costs_one_step(
    tmp_path: Path, undisturbed: Report
) -> None:
    # Before anybody has been slow for so long that it would be swapped.
    flip = FLIP | {"state": "weights", "atStep": 11}
    # A spare would only import torch: nobody takes it.
    mended, report = disturbed(tmp_path, flip, spares=0)

    facts = [
        entry.event.fact
        for entry in mended.entries()
        if isinstance(entry.event, Reported) and isinstance(entry.event.fact, StateRepaired)
    ]
    assert {(f.ranks, f.source, f.count, f.problem) for f in facts} == {((1,), 0, 1, "")}
    assert len({f.step for f in facts}) == 1
    (incident,) = [i for i in report.incidents if i.kind == "state-repaired"]
    assert (incident.rung, incident.lost_steps) == ("repair by copy", 1)
    assert incident.suspects == ["rank 1", "node-1"]
    assert report.faults[1].found_by == incident.id
    assert report.final_state_digest == undisturbed.final_state_digest
    assert report.losses == undisturbed.losses
    assert (report.divergences, report.replicas_differ) == ([], [])
    ledger = DeviceLedger(LocalStore(mended.folder.devices))
    ledger.refresh()
    assert [v.act for v in ledger.verdicts if v.incident == incident.id] == [Act.SUSPECTED]


def test_where_nothing_is_to_be_mended_such_a_bit_costs_its_node_and_nothing_else(
    tmp_path: Path, undisturbed: Report
) -> None:
    corrupted, report = disturbed(tmp_path, FLIP, repair=False)

    (found,) = [e.event for e in corrupted.entries() if isinstance(e.event, Compared)]
    assert (found.fact.nodes, found.fact.ranks) == (("node-1",), (1,))
    assert (found.fact.proven, found.fact.step, found.fact.since) == (True, 17, 16)
    assert "exp_avg of shard 0 had 2 digests" in found.fact.evidence
    (incident,) = [i for i in report.incidents if i.kind == "silent-corruption"]
    assert incident.suspects == ["rank 1", "node-1"]
    assert incident.rung == "roll back before the onset"
    assert incident.reached_step <= 17, "it has learned nothing since"
    assert report.final_state_digest == undisturbed.final_state_digest
    assert report.losses == undisturbed.losses
    assert (report.divergences, report.replicas_differ) == ([], [])
    (device,) = [
        device
        for entry in corrupted.entries()
        if isinstance(entry.event, Reported) and isinstance(entry.event.fact, Joined)
        for device in entry.event.fact.devices
        if entry.event.node == "node-1"
    ][:1]
    ledger = DeviceLedger(LocalStore(corrupted.folder.devices))
    ledger.refresh()
    (verdict,) = ledger.verdicts
    assert (verdict.serial, verdict.proof, verdict.incident) == (
        device.serial,
        "vote",
        incident.id,
    )
    assert not (tmp_path / "home" / "@devices").exists(), "it was we who broke it"


def test_products_that_come_out_wrong_on_one_rank_are_found_before_a_step_uses_them(
    tmp_path: Path, undisturbed: Report
) -> None:
    wrong = {
        "when": {"step": 8},
        "fault": "wrong-matmul",
        "rank": 1,
        "tensor": "layers.1.ffn.w1.weight",
        "magnitude": 0.001,
        "atStep": 16,
    }
    _, report = disturbed(tmp_path, wrong)

    (incident,) = [i for i in report.incidents if i.kind == "silent-corruption"]
    assert incident.suspects == ["rank 1", "node-1"]
    assert "in step 16, micro-batches came out otherwise" in incident.evidence[0]
    assert (
        "found after step 15, step 14 is the last that is known to be good" in incident.evidence[0]
    )
    assert report.final_state_digest == undisturbed.final_state_digest
    assert report.losses == undisturbed.losses
    assert report.divergences == []
