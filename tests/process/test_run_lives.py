"""Whole runs that are interrupted and run again, and what their last report tells."""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core import journal
from orchestrator.core.events import Inherited
from orchestrator.protocol.ids import Generation, Seconds, Step
from storage.address import open_store
from storage.commit import latest_commit
from tests.runs import Job, steps_job

pytestmark = pytest.mark.process
WHOLE = [(step, 1.0 / step) for step in range(1, 61)]


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Job]:
    options = {"steps": 60, "step_s": 0.1, "save_every": 5, "durable_every": 20}
    made = Job(tmp_path, steps_job(nodes__spares=0, trainer__options=options))
    yield made
    made.close()


def newest(one: Job) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    found = latest_commit(open_store(one.folder.checkpoints.as_uri()))
    return found[1] if found else 0


def interrupt(one: Job, *, beyond: int) -> None:
    """Press Ctrl-C once that step is committed."""
    started = one.start("--quiet")
    await_commit(one, beyond=beyond)
    started.send_signal(signal.SIGINT)
    assert one.finish() == 130


def await_commit(one: Job, *, beyond: int) -> None:
    deadline = time.monotonic() + 45
    while not one.folder.checkpoints.exists() or newest(one) < beyond:
        assert time.monotonic() < deadline, one.output()
        time.sleep(0.05)


def test_a_run_that_was_interrupted_twice_reports_the_loss_of_every_step(one: Job) -> None:
    interrupt(one, beyond=20)
    assert one.report().losses_missing == []
    interrupt(one, beyond=40)

    code, report = one.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.losses == WHOLE
    assert report.losses_missing == report.divergences == []
    assert report.generation >= 3
    assert sorted(p.name for p in one.folder.root.glob("journal*")) == [
        "journal",
        "journal.1",
        "journal.2",
    ]
    assert one.leftovers() == []


def test_a_controller_that_was_killed_while_it_took_over_a_life_is_followed_by_one_that_does(
    one: Job,
) -> None:
    interrupt(one, beyond=20)
    former = one.folder.journal.read_bytes()
    header = journal.read(former).header
    one.folder.journal.rename(one.folder.root / "journal.1")
    half = Inherited(
        at=Seconds(0.0),
        generation=Generation(1),
        losses=((Step(1), 1.0),),
        untold_step=Step(0),
    )
    lines = journal.line(header) + journal.line(journal.Entry(seq=1, event=half))
    one.folder.journal.write_bytes(lines)

    code, report = one.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.losses == WHOLE
    assert one.folder.journal.read_bytes().startswith(lines)


def test_a_life_whose_start_was_cut_short_does_not_begin_anew_on_a_durable_tier_that_is_gone(
    one: Job,
) -> None:
    interrupt(one, beyond=20)
    one.folder.journal.rename(one.folder.root / "journal.1")
    away = one.folder.checkpoints.rename(one.root / "not-mounted")

    code, report = one.conduct()

    assert (code, report.state) == (3, "Failed")
    assert "this run committed some, the newest of step " in report.reason
    assert report.generations == 0

    shutil.rmtree(one.folder.checkpoints, ignore_errors=True)
    away.rename(one.folder.checkpoints)
    code, report = one.conduct()
    assert (code, report.losses) == (0, WHOLE)
    assert one.leftovers() == []


def test_a_run_that_failed_goes_on_once_its_run_file_is_repaired(one: Job) -> None:
    options = one.run["spec"]["trainer"]["options"]
    options["raise_at"] = 45
    one.start("--quiet")
    assert one.finish() == 3
    assert "ArithmeticError" in one.output()
    del options["raise_at"]
    one.run["spec"]["recovery"] = {"softwareBudget": 2}

    code, report = one.conduct()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.losses == WHOLE
    assert one.leftovers() == []


def test_a_former_journal_that_is_damaged_is_named_and_nothing_is_begun(one: Job) -> None:
    interrupt(one, beyond=20)
    lines = one.folder.journal.read_bytes().splitlines(keepends=True)
    lines[3] = bytes([lines[3][0] ^ 1]) + lines[3][1:]  # of a digit, another one
    before = one.folder.root / "journal.1"
    before.write_bytes(b"".join(lines))
    one.folder.journal.unlink()

    one.start("--quiet")

    assert one.finish() == 1
    assert "line 4 is damaged: checksum is" in one.output()
    assert str(before) in one.output()
    assert before.read_bytes() == b"".join(lines)
    assert one.leftovers() == []


def test_a_run_that_was_told_to_ignore_hang_ups_outlives_one(one: Job) -> None:
    started = one.start("--quiet", before=("nohup",))
    await_commit(one, beyond=20)

    started.send_signal(signal.SIGHUP)

    assert one.finish() == 0, one.output()
    assert one.report().state == "Succeeded"
    assert one.leftovers() == []


def test_a_run_in_the_background_is_not_ended_by_an_interrupt_of_the_foreground(one: Job) -> None:
    started = one.start("--quiet", before=("env", "--ignore-signal=INT"))
    await_commit(one, beyond=20)

    started.send_signal(signal.SIGINT)

    assert one.finish() == 0, one.output()
    assert one.leftovers() == []
