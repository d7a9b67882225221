"""What is made of a run without a fault whose world shrank and grew back."""

import msgspec
import pytest

from orchestrator.campaign import job
from orchestrator.campaign.summary import Clean, Resized, campaign
from orchestrator.cli import campaigns
from orchestrator.cli.campaign_resizes import judged
from orchestrator.cli.choices import Form
from orchestrator.core.incident import CORRUPTION, REPAIR
from orchestrator.core.report import IncidentReport, Report, report
from orchestrator.protocol.ids import Step
from tests.conftest import Cluster
from tests.unit.test_campaign_timed import incident

FINDINGS_SAY = (
    "step 41: the norm stood out; other ranks get the same: it is the data\n"
    "step 52 is thrown away and computed again: the gradient adds up to 3\n"
    "step 60 is not saved\n"
)


def told(*incidents: IncidentReport, **changes: object) -> Report:
    """Return the report of a run that shrank to two replicas and grew back to three."""
    base = report(Cluster().state)
    full = {
        "final_step": base.steps,
        "replicas": job.RANKS,
        "replicas_least": 2,
        "incidents": list(incidents),
    }
    return msgspec.structs.replace(base, **{**full, **changes})


LOST = incident("node-lost", 1)
BACK = incident("grow-back")


def test_that_a_node_was_gone_and_came_back_is_no_false_alarm() -> None:
    found = judged(told(LOST, BACK), "")

    assert found == Resized(steps=told().steps, resized=True)


@pytest.mark.parametrize(
    "false",
    [
        incident(CORRUPTION, 2),
        incident(REPAIR, 2),
        incident("hang", 2),
        incident("straggler", 2, cause="hardware"),
        msgspec.structs.replace(incident("broken-collective", 2), false_alarm=True),
    ],
    ids=lambda each: each.kind,
)
def test_whatever_else_accuses_somebody_is_one(false: IncidentReport) -> None:
    (alarm,) = judged(told(LOST, false, BACK), "").alarms

    assert alarm == f"{false.kind}: no rank moved"


def test_who_is_slow_for_what_it_has_to_do_is_not_accused() -> None:
    assert judged(told(incident("straggler", 2, cause="software")), "").alarms == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergences": [Step(7)]}, "step 7 came out otherwise"),
        ({"digests_differ": [Step(8)]}, "step 8 came out otherwise"),
        ({"replicas_differ": [2]}, "ended with another state"),
        ({"final_step": Step(9), "reason": "budget"}, "ended after step 9: budget"),
    ],
)
def test_a_run_that_does_not_come_out_as_it_should_is_one_as_well(
    changes: dict[str, object], words: str
) -> None:
    (alarm,) = judged(told(**changes), "").alarms

    assert words in alarm


def test_steps_that_were_computed_once_more_are_false_triggers() -> None:
    assert judged(told(), FINDINGS_SAY).false_triggers == 2


def test_a_world_that_did_not_grow_back_was_not_resized_and_its_steps_count_all_the_same() -> None:
    stayed = judged(told(replicas=2), FINDINGS_SAY)
    runs = [stayed, msgspec.structs.replace(stayed, resized=True, alarms=("x",))]
    found = campaign([], seed=1, trials=0, ranks=3, clean=Clean(100, (), 1, runs), pairs=[])

    assert (stayed.resized, found.resizes) == (False, 1)
    alarms = found.summary.false_alarms_per_1000_steps
    assert (alarms.count, alarms.of, found.alarms) == (1, 100 + 2 * stayed.steps, ["x"])
    assert found.summary.false_triggers_per_1000_steps.count == 5
    assert "1, among these" in campaigns.shown(found, Form.TEXT)
