"""What is known of a campaign goes on from its file, or is refused with a hint."""

import io
import resource
from pathlib import Path

import msgspec
import pytest

from orchestrator.campaign import job
from orchestrator.campaign.catalogue import SELECTABLE
from orchestrator.campaign.judging import Result
from orchestrator.cli import campaign_kept, campaigning
from orchestrator.cli.campaign_kept import Came, Which
from orchestrator.cli.campaigning import Asked
from orchestrator.cli.errors import CliError, Exit

ASKED = Asked(trials=2, seed=1, clean_steps=0, pairs=0, whole_runs=False)
WHICH = Which(seed=1, trials=2, whole_runs=False, run=job.small())
DONE = tuple(Result(number=n, name="a class", group="state", effective=True) for n in range(2))


def lines(*later: object) -> bytes:
    """Return the file of a campaign of which some things are known."""
    return b"".join(msgspec.json.encode(line) + b"\n" for line in (WHICH, *later))


def results(*done: Result) -> list[Came]:
    return [Came(result=result) for result in done]


def test_a_campaign_that_is_done_is_told_from_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "campaign.jsonl").write_bytes(lines(*results(*DONE)))

    told = campaigning.run(None, ASKED, tmp_path, progress=io.StringIO())

    assert (told.done, told.trials) == (2, 2)


@pytest.mark.parametrize(
    "file",
    [
        b"{",
        b"",
        b"{}\n",
        lines(*results(*DONE)).replace(b"a class", b"\xff", 1),
        lines(*results(DONE[0])) + b"\n" + lines(*results(DONE[1])),
        lines(*results(*DONE, DONE[0])),
        lines(*results(*DONE, msgspec.structs.replace(DONE[0], number=99))),
        lines({"pair": (1.0, 0.0)}),
        lines({"clean_steps": -5}),
        lines({"another": 5}),
        lines(*results(msgspec.structs.replace(DONE[0], steps=-1))),
        lines(*results(msgspec.structs.replace(DONE[0], rightly=1))),
        lines(*results(msgspec.structs.replace(DONE[0], baselines={"a guess": 1}))),
    ],
    ids=[
        "torn",
        "empty",
        "of nothing",
        "no text",
        "an empty line",
        "twice",
        "not drawn",
        "no time",
        "fewer than none",
        "not known",
        "less than no step",
        "right more often than said",
        "a rule that there is not",
    ],
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, file: bytes) -> None:
    (tmp_path / "campaign.jsonl").write_bytes(file)

    with pytest.raises(CliError, match="not the results of a campaign") as refused:
        campaigning.run(None, ASKED, tmp_path, progress=io.StringIO())

    assert "remove it to begin anew" in refused.value.hint
    assert (tmp_path / "campaign.jsonl").read_bytes() == file


def test_a_result_costs_a_line_and_a_line_that_is_torn_never_came(tmp_path: Path) -> None:
    """To write everything again each time would take the longer the more there is."""
    file = tmp_path / campaign_kept.NAME
    first = campaign_kept.kept(tmp_path, WHICH, lambda _: range(2))
    first.add(Came(result=DONE[0], clean_steps=7, alarms=("x",), false_triggers=1))
    whole = file.read_bytes()
    for cut in (1, 20, len(msgspec.json.encode(Came(result=DONE[1])))):
        file.write_bytes(whole + lines(Came(result=DONE[1])).splitlines()[1][:cut])

        second = campaign_kept.kept(tmp_path, WHICH, lambda _: range(2))

        assert second.results == [DONE[0]]
        assert second.clean == (7, ["x"], 1, [])
        assert second.calm_steps == 0
        assert file.read_bytes() == whole
        second.add(Came(result=DONE[1]))
        second.add(Came(clean_steps=100, calm=True))
        assert file.read_bytes().startswith(whole)
        third = campaign_kept.kept(tmp_path, WHICH, lambda _: range(2))
        assert (third.results, third.clean.steps) == (list(DONE), 107)
        assert third.calm_steps == 100


def test_a_line_of_which_a_disk_takes_a_part_is_an_error_and_never_came(tmp_path: Path) -> None:
    """Else the next one would be written behind it, and nothing could be read any more."""
    known = campaign_kept.kept(tmp_path, WHICH, lambda _: range(2))
    size = (tmp_path / campaign_kept.NAME).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            known.add(Came(result=DONE[0]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert known.results == []
    again = campaign_kept.kept(tmp_path, WHICH, lambda _: range(2))
    again.add(Came(result=DONE[0]))
    assert campaign_kept.kept(tmp_path, WHICH, lambda _: range(2)).results == [DONE[0]]


def test_a_folder_that_no_campaign_has_left_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "thesis").write_text("all of it")

    with pytest.raises(CliError, match="of another kind is in the way") as refused:
        campaigning.run(None, ASKED, tmp_path, progress=io.StringIO())

    assert refused.value.code is Exit.USAGE
    assert (tmp_path / "room" / "thesis").read_text() == "all of it"


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2), ("trials", 3), ("groups", ("state",)), ("classes", ("hang",))],
)
def test_what_is_known_of_another_campaign_is_refused(
    tmp_path: Path, name: str, value: object
) -> None:
    (tmp_path / "campaign.jsonl").write_bytes(lines())
    other = msgspec.structs.replace(ASKED, **{name: value})

    with pytest.raises(CliError, match=f"{name} of the campaign that lies there") as refused:
        campaigning.run(None, other, tmp_path, progress=io.StringIO())

    assert refused.value.code is Exit.USAGE


def test_groups_are_some_that_there_are_of_corruption() -> None:
    both = campaigning.groups_of("persistent, state", ("corruption", "hang"))

    assert both == ("state", "persistent")
    assert campaigning.groups_of(None, ("hang",)) == SELECTABLE
    for wrong in ("", "state,", "live", "hang", "State"):
        with pytest.raises(CliError, match="expected some of state, persistent") as refused:
            campaigning.groups_of(wrong, ("corruption",))
        assert refused.value.code is Exit.USAGE
    with pytest.raises(CliError, match="expected corruption among --classes: hang") as refused:
        campaigning.groups_of("state", ("hang",))
    assert refused.value.code is Exit.USAGE


def test_no_more_steps_without_a_fault_are_taken_than_were_asked_for() -> None:
    assert campaigning.stretches(10) == [10]
    assert campaigning.stretches(200) == [100, 100]
    assert campaigning.stretches(0) == []
