"""What is known of a campaign goes on from its file, or is refused with a hint."""

import io
from pathlib import Path

import msgspec
import pytest

from orchestrator.campaign import job
from orchestrator.campaign.judging import Result
from orchestrator.cli import campaigning
from orchestrator.cli.campaigning import Asked, Kept
from orchestrator.cli.errors import CliError

ASKED = Asked(trials=2, seed=1, clean_steps=0, pairs=0, whole_runs=False)
DONE = tuple(Result(number=n, name="a class", group="state", effective=True) for n in range(2))


def kept(*results: Result, **changes: object) -> bytes:
    """Return the file of a campaign that has some results."""
    known = Kept(seed=1, trials=2, whole_runs=False, run=job.small(), results=list(results))
    return msgspec.json.encode(msgspec.to_builtins(known) | changes)


def test_a_campaign_that_is_done_is_told_from_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "campaign.json").write_bytes(kept(*DONE))

    told = campaigning.run(None, ASKED, tmp_path, progress=io.StringIO())

    assert (told.done, told.trials) == (2, 2)


@pytest.mark.parametrize(
    "file",
    [
        b"{",
        b"",
        kept(*DONE).replace(b"a class", b"\xff", 1),
        kept(*DONE, DONE[0]),
        kept(*DONE, msgspec.structs.replace(DONE[0], number=99)),
        kept(*DONE, pairs=[(1.0, 0.0)]),
        kept(*DONE, clean_steps=-5),
    ],
    ids=["torn", "empty", "no text", "twice", "not drawn", "no time", "fewer than none"],
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, file: bytes) -> None:
    (tmp_path / "campaign.json").write_bytes(file)

    with pytest.raises(CliError, match="not the results of a campaign") as refused:
        campaigning.run(None, ASKED, tmp_path, progress=io.StringIO())

    assert "remove it to begin anew" in refused.value.hint


def test_no_more_steps_without_a_fault_are_taken_than_were_asked_for() -> None:
    assert campaigning.stretches(10) == [10]
    assert campaigning.stretches(200) == [100, 100]
    assert campaigning.stretches(0) == []
