"""The journal on disk under one writer at a time, torn ends and foreign runs."""

import os
from pathlib import Path

import pytest

from orchestrator import compose
from orchestrator.core.controller import Controller
from orchestrator.core.events import ControllerStarted, StopRequested, Tick
from orchestrator.core.journal import JournalError, read
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.deciding import take_over
from orchestrator.server.journal import AlreadyRunningError, JournalFile, lock
from orchestrator.worlds.folder import RunFolder
from tests import runfiles

RUN = runfiles.text(trainer={"steps": 10})


def training_run(text: str = RUN) -> TrainingRun:
    return compose.parse(text, TrainingRun, "run.yaml")


def written(path: Path, ticks: int = 3) -> Controller:
    controller = compose.controller(training_run())
    file = JournalFile(path, training_run())
    events = [ControllerStarted(at=Seconds(0.0), incarnation=1)]
    events += [Tick(at=Seconds(0.1 * n)) for n in range(ticks)]  # type: ignore[misc]
    for event in events:
        file.append(event, controller.handle(event))
    file.close()
    return controller


def test_what_was_written_is_read_back_and_goes_on(tmp_path: Path) -> None:
    written(tmp_path / "journal")

    taken = take_over(RunFolder(tmp_path), training_run())
    file, event = taken.file, Tick(at=Seconds(9.0))
    file.append(event, taken.controller.handle(event))
    file.close()

    assert [e.seq for e in read((tmp_path / "journal").read_bytes()).entries] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_end_is_cut_off_and_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    written(path)
    path.write_bytes(path.read_bytes()[:-cut])

    file = JournalFile(path, training_run())
    file.append(Tick(at=Seconds(9.0)), [])
    file.close()

    assert "torn" in file.torn
    assert len(file.entries) == 3
    assert read(path.read_bytes()).torn == ""


def test_a_header_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    JournalFile(path, training_run()).close()
    whole = path.read_bytes()

    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        JournalFile(path, training_run()).close()
        assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(JournalError, match="damaged"):
        JournalFile(path, training_run())

    assert path.read_bytes() == data


def test_the_journal_of_another_run_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "journal")

    with pytest.raises(JournalError, match="another run file"):
        JournalFile(tmp_path / "journal", training_run(RUN.replace("10", "11")))


def test_a_journal_whose_decisions_come_out_differently_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path, training_run())
    file.append(StopRequested(at=Seconds(1.0), by="nobody"), [])
    file.close()

    with pytest.raises(JournalError, match="event 1 leads to other decisions"):
        take_over(RunFolder(tmp_path), training_run())


def test_a_second_holder_of_the_lock_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock")

    with pytest.raises(AlreadyRunningError):
        lock(tmp_path / "lock")

    os.close(held)
    os.close(lock(tmp_path / "lock"))
