"""What a person is told in passing is true of what they did."""

from pathlib import Path

import msgspec
import pytest

from orchestrator.campaign.bisecting import Found
from orchestrator.cli import bisect, drill, reporting, story
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import Exit
from orchestrator.cli.outcome import outcome
from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.report import incident_reports
from orchestrator.core.standing import Act, Proof
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Serial, Step
from orchestrator.worker import EXIT_MISCONFIGURED
from orchestrator.worlds.folder import RunFolder
from tests.conftest import Cluster
from tests.journals import killed_rank, raising


def test_training_that_was_not_interrupted_does_not_start_again() -> None:
    incident = incident_reports(killed_rank().state)[0]
    assert "; training again after " in reporting.incident_line(incident)

    passed = msgspec.structs.replace(
        incident, rung="none", reason="training was not interrupted", lost_steps=0
    )

    assert reporting.incident_line(passed).endswith("  training was not interrupted")


@pytest.mark.parametrize("timed_out_s", [None, 3.0])
def test_a_drill_that_was_cut_short_can_only_be_made_anew(
    timed_out_s: float | None, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "disturbed")
    ended = outcome(killed_rank().state, folder, timed_out_s)

    error = drill.cut_short(ended)

    assert error is not None
    assert error.code is ended.code
    assert str(error) == ended.message
    assert "goes on" not in error.hint
    assert "another folder with --out" in error.hint
    assert ("--timeout" in error.hint) is (error.code is Exit.TIMED_OUT)


def test_a_run_of_a_bad_file_ends_as_a_command_does_that_was_given_one(tmp_path: Path) -> None:
    refused, folder = Cluster(), RunFolder(tmp_path)
    refused.start()
    refused.exit(0, EXIT_MISCONFIGURED, kind="MisconfiguredError", refused=True)

    ended = outcome(refused.state, folder, None)

    assert ended.code is Exit.USAGE
    assert "refused its job" in ended.message
    assert outcome(raising().state, folder, None).code is Exit.RUN_FAILED


@pytest.mark.parametrize(
    ("act", "proof", "words"),
    [
        (Act.CONVICTED, Proof.VOTE, "gpu GPU-1 is convicted by vote: digests differ"),
        (Act.SUSPECTED, Proof.NONE, "gpu GPU-1 is suspected: digests differ"),
    ],
)
def test_a_verdict_in_a_time_line_says_of_what_and_what_it_is(
    act: Act, proof: Proof, words: str
) -> None:
    order = JudgeDevice(
        generation=Generation(1),
        reason="digests differ",
        id="r/0/1/12.0",
        device=Device(Serial("GPU-1"), "gpu", "driver"),
        node=NodeId("node-1"),
        act=act,
        actor="controller",
        by="the controller of r",
        proof=proof,
    )

    assert story.decision(order) == f"JudgeDevice {words}"


@pytest.mark.parametrize(("start", "earlier"), [("the seed", False), ("the checkpoint 20@1", True)])
def test_who_computed_from_the_seed_is_not_told_to_begin_earlier(
    start: str, *, earlier: bool
) -> None:
    found = Found(start=start, first=Step(1), last=Step(9), compared=9)

    text = bisect.told(found, Form.TEXT)

    assert "came to the same bits" in text
    assert ("begin earlier" in text) is earlier
    assert ("before that" in text) is earlier
