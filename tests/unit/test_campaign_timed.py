"""Trials that are a matter of time: what is drawn, and what is made of such a run."""

from typing import Any

import msgspec
import pytest

from orchestrator.campaign import job, timed
from orchestrator.campaign.catalogue import Trial
from orchestrator.campaign.intervals import of_quantile
from orchestrator.campaign.judging import Result
from orchestrator.campaign.summary import Clean, campaign
from orchestrator.campaign.timed import CLASSES, draw
from orchestrator.cli import campaigning, campaigns
from orchestrator.cli.campaign_runs import judged_in_time, plan_of
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.core.report import IncidentReport
from orchestrator.faults.plan import check
from orchestrator.protocol.ids import Generation, IncidentId, Rank, Step
from orchestrator.worlds.machine import node_names

HANG = Trial(number=1, name="hang", group="hang", live="freeze-rank", rank=Rank(1), step=14)
SLOW = Trial(
    number=2, name="slow", group="straggler", live="throttle-rank", rank=Rank(1), step=14,
    shape={"times": 1.5}, blame="hardware",
)  # fmt: skip
BUSY = Trial(
    number=3, name="busy", group="straggler", live="overload-rank", rank=Rank(1), step=14,
    shape={"times": 1.5}, blame="workload",
)  # fmt: skip


def incident(kind: str, *ranks: int, at: float = 21.0, cause: str = "unknown") -> IncidentReport:
    return IncidentReport(
        id=IncidentId(f"inc-{kind}-{at:g}"), kind=kind, cause=cause,
        suspects=[f"rank {r}" for r in ranks] + [f"node-{r}" for r in ranks],
        began_s=at - 1, detected_after_s=1.0, decided_after_s=1.0, first_step_after_s=2.0,
        rung="restart-in-place", lost_steps=0, reason="it stood still", generation=Generation(1),
        reached_step=Step(17), restored_step=Step(15), restored_from="memory", durable_reads=0,
        evidence=["no rank moved"], ledger={}, faults=[], false_alarm=False, stacks=(), unseen={},
    )  # fmt: skip


def judge(trial: Trial, *incidents: IncidentReport) -> Result:
    return judged_in_time(trial, 20.0, incidents, 60)


@pytest.mark.parametrize("kind", ["hang", "straggler"])
def test_classes_come_in_turn_and_each_trial_is_a_plan_that_its_run_takes(
    kind: timed.Kind,
) -> None:
    classes = [each for each in CLASSES if each.group == kind]
    trials = draw(kind, 5, 3 * len(classes), ranks=3, first=7)
    run = job.timed(timed.STEPS)

    assert [trial.number for trial in trials] == list(range(7, 7 + len(trials)))
    assert [trial.name for trial in trials] == 3 * [each.name for each in classes]
    assert trials == draw(kind, 5, len(trials), ranks=3, first=7)
    assert trials != draw(kind, 6, len(trials), ranks=3, first=7)
    for trial in trials:
        nodes = tuple(node_names(run))
        check(plan_of(trial), world_size=3, nodes=nodes, steps=timed.STEPS)
        (fault,) = plan_of(trial).faults
        assert fault.rank == trial.rank
        assert fault.when.step == trial.step


def test_a_hang_that_is_found_counts_as_exact_only_with_the_culprit_alone() -> None:
    found = judge(HANG, incident("hang", 1))

    assert (found.noticed, found.named, found.seconds, found.latency) == (True, "exact", 1.0, 3)
    assert judge(HANG, incident("hang", 0)).named == "wrong"
    assert judge(HANG, incident("hang", 0, 1)).named == "among others"
    assert judge(HANG, incident("hang")).named == "nobody"
    elsewhere = msgspec.structs.replace(incident("hang", 1), suspects=["rank 1", "node-0"])
    assert judge(HANG, elsewhere).named == "among others"


def test_what_was_found_before_the_fault_is_no_notice_and_a_run_begun_again_for_nothing() -> None:
    early = judge(HANG, incident("hang", 1, at=19.0))

    assert not early.noticed
    assert early.false_kills == 1
    assert judge(HANG, incident("hang", 1, at=19.0), incident("hang", 1)).false_kills == 1
    assert judge(HANG, incident("hang", 1), incident("broken-collective", at=22.0)).false_kills == 1
    assert judge(HANG, incident("hang", 1), incident("planned", 2)).false_kills == 0


def test_a_fault_that_was_not_let_loose_is_no_trial() -> None:
    assert not judged_in_time(HANG, None, [incident("hang", 1)], 60).effective


def test_whoever_else_is_called_slow_counts_against_precision_and_is_no_notice() -> None:
    right = incident("straggler", 1, cause="hardware")
    wrong = incident("straggler", 0, cause="hardware")
    busy = incident("straggler", 1, cause="software")

    assert judge(SLOW, right).verdict == "hardware"
    assert (judge(SLOW, right, wrong).accused, judge(SLOW, right, wrong).rightly) == (2, 1)
    assert not judge(SLOW, wrong).noticed
    assert (judge(BUSY, right).accused, judge(BUSY, right).rightly) == (1, 0)
    assert (judge(BUSY, busy).accused, judge(BUSY, busy).verdict) == (0, "workload")
    # Also where a rank stands still, and no device is slow.
    assert (judge(HANG, wrong).accused, judge(HANG, wrong).rightly) == (1, 0)


def test_a_summary_tells_hangs_and_slow_ranks_apart() -> None:
    right = incident("straggler", 1, cause="hardware")
    results = [
        judge(HANG, incident("hang", 1)),
        judge(HANG, incident("hang", 0, at=23.0)),
        judge(HANG),
        judge(SLOW, right),
        judge(SLOW),
        judge(BUSY, right),
    ]
    told = campaign(results, seed=1, trials=6, ranks=3, clean=Clean(0), pairs=[])

    summary = told.summary
    counts = {
        name: (getattr(summary, name).count, getattr(summary, name).of)
        for name in (
            "hang_recall", "hang_culprit_exact", "straggler_recall", "straggler_within_20_steps",
            "straggler_precision", "straggler_verdict_right", "hang_false_kills_per_1000_steps",
        )
    }  # fmt: skip
    assert counts == {
        "hang_recall": (2, 3),
        "hang_culprit_exact": (1, 3),
        "straggler_recall": (1, 2),
        "straggler_within_20_steps": (1, 2),
        "straggler_precision": (1, 2),
        "straggler_verdict_right": (1, 2),
        "hang_false_kills_per_1000_steps": (0, 360),
    }
    # One of three was missed: nobody knows within what time 95 % would be noticed.
    assert summary.hang_latency_p95_s is not None
    assert (summary.hang_latency_p95_s.value, summary.hang_latency_p95_s.of) == (None, 3)
    assert "? s (3.0 to ?), of 3" in campaigns.shown(told, Form.TEXT)
    found = campaign(results[:2], seed=1, trials=2, ranks=3, clean=Clean(0), pairs=[])
    assert found.summary.hang_latency_p95_s is not None
    assert found.summary.hang_latency_p95_s.value == 3.0
    assert summary.state_recall.of == 0
    text = campaigns.shown(told, Form.TEXT)
    assert "Hangs:" in text
    assert "State:" not in text


def test_classes_are_named_in_any_order_and_nothing_else_is_one() -> None:
    assert campaigning.classes_of("straggler, hang") == ("hang", "straggler")

    with pytest.raises(CliError) as refused:
        campaigning.classes_of("hang,slow")

    assert refused.value.code is Exit.USAGE
    assert "'slow', expected some of corruption, hang, straggler" in str(refused.value)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1.0, None, None)), (3, (3.0, 2.0, None)), (100, (95.0, 90.0, 100.0))],
)
def test_a_quantile_says_when_there_are_too_few_values_for_a_limit(
    count: int, expected: tuple[Any, ...]
) -> None:
    assert of_quantile([float(n) for n in range(1, count + 1)], 0.95) == expected
