import math
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.agent import linux
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.worker.beacon import (
    GROUP_NAME_MAX,
    GROUPS_MAX,
    PAGE_BYTES,
    RING_STEPS,
    WHAT_MAX,
    BeaconError,
    BeaconReader,
    BeaconWriter,
    Reading,
    StepRecord,
    create,
)

WRITER = """
import sys
from pathlib import Path
from orchestrator.worker.beacon import BeaconWriter, StepRecord

writer, n = BeaconWriter(Path(sys.argv[1])), 0
while True:
    n += 1
    writer.update(step=n, micro_batch=n, collectives=n)
    writer.record(StepRecord(n, n, n / 2, n / 4, n, n / 8))
"""


def record(step: int, loss: float = 2.5) -> StepRecord:
    return StepRecord(Generation(1), Step(step), loss, 1.0, 100, 0.1)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "beacon"
    create(path)
    return path


@pytest.fixture
def writing(page: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A live process that writes to the page in a tight loop."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(page)])
    try:
        reader, deadline = BeaconReader(page), time.monotonic() + 20
        while reader.read().step < 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.wait(10)


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 10
    while (vitals := linux.vitals(pid)) is None or vitals.state != "T":
        assert time.monotonic() < deadline


def test_a_page_that_nobody_has_written_reads_as_starting(page: Path) -> None:
    assert BeaconReader(page).read().phase is RankPhase.STARTING
    assert BeaconReader(page).new_steps() == []


def test_what_the_rank_writes_is_what_the_agent_reads(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)

    writer.update(rank=Rank(3), phase=RankPhase.BACKWARD, step=Step(7), micro_batch=2)

    reading = reader.read()
    assert (reading.rank, reading.phase, reading.step, reading.micro_batch) == (3, 7, 7, 2)
    assert reading == writer.now


def test_every_update_is_a_sign_of_life(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)
    before = reader.read().progress

    for _ in range(3):
        writer.update(phase=RankPhase.FORWARD)

    assert reader.read().progress == before + 3


def test_collectives_are_counted_for_each_group_and_in_all(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)
    writer.update(generation=Generation(4))
    writer.groups(["all", "tp@2"])

    for slot in (0, 1, 1, None):
        writer.enter(slot)
    writer.leave(1)

    assert reader.groups(Generation(4)) == [("all", 1, 0, ""), ("tp@2", 2, 1, "")]
    assert (reader.read().collectives, reader.read().left) == (4, 1)
    assert reader.groups(Generation(3)) == []


def test_groups_of_a_new_generation_count_from_0_on(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)
    writer.groups(["all", "tp@2"])
    writer.enter(1)
    writer.update(generation=Generation(1))

    assert reader.groups(Generation(1)) == []
    writer.groups(["all"])
    assert reader.groups(Generation(1)) == [("all", 0, 0, "")]


def test_what_was_entered_last_is_told_for_each_group(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)
    writer.groups(["all", "tp@2"])

    writer.enter(0, "allgather of 24 B")
    writer.enter(1, "\u00e4" * WHAT_MAX)
    writer.enter(None, "nobody knows where")

    told = [each.what for each in reader.groups(Generation(0))]
    assert told == ["allgather of 24 B", "\u00e4" * (WHAT_MAX // 2)]
    writer.enter(0)
    assert reader.groups(Generation(0))[0].what == "", "the next one is not what that was"
    writer.groups(["all", "tp@2"])
    assert [each.what for each in reader.groups(Generation(0))] == ["", ""]


def test_of_more_groups_than_there_is_room_for_the_first_are_named(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)
    writer.record(record(1))

    writer.groups([f"group@{n}" for n in range(99)])
    for slot in range(GROUPS_MAX):
        writer.enter(slot)

    assert len(reader.groups(Generation(0))) == GROUPS_MAX
    assert reader.read().collectives == GROUPS_MAX
    assert [each.step for each in reader.new_steps()] == [1]


@pytest.mark.parametrize("name", ["", "x" * (GROUP_NAME_MAX + 1)])
def test_a_group_whose_name_has_no_room_is_refused(page: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 24 bytes"):
        BeaconWriter(page).groups([name])


def consistent(reading: Reading, before: Reading) -> bool:
    same = reading.step == reading.micro_batch == reading.collectives
    return same and reading.step >= before.step and reading.progress >= before.progress


def test_every_look_at_a_rank_that_writes_without_pause_is_at_one_whole_reading(
    page: Path, writing: subprocess.Popen[bytes]
) -> None:
    reader, before, steps = BeaconReader(page), BeaconReader(page).read(), 0
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        reading = reader.read()
        assert consistent(reading, before), reading
        before = reading
        for record in reader.new_steps():
            n = record.step
            assert record == StepRecord(Generation(n), n, n / 2, n / 4, n, n / 8)
            assert n > steps
            steps = n

    assert writing.poll() is None
    assert before.step > 1000
    assert steps > 1000


def test_a_rank_that_was_frozen_at_any_moment_shows_its_last_whole_reading(
    page: Path, writing: subprocess.Popen[bytes]
) -> None:
    reader, before = BeaconReader(page), BeaconReader(page).read()
    chance = np.random.default_rng(1)
    for _ in range(150):
        time.sleep(chance.uniform(0.0, 0.003))
        writing.send_signal(signal.SIGSTOP)
        wait_until_stopped(writing.pid)

        reading = reader.read()

        assert consistent(reading, before), reading
        assert reader.read() == reading
        before = reading
        writing.send_signal(signal.SIGCONT)
    assert before.step > 1000


@pytest.mark.parametrize("byte", [64, 64 + 79, 64 + 83])
def test_a_reading_that_is_not_whole_is_not_passed_on(page: Path, byte: int) -> None:
    writer = BeaconWriter(page)
    writer.update(step=Step(5))  # its second writing, so in the first copy
    image = bytearray(page.read_bytes())
    image[byte] ^= 1
    page.write_bytes(image)

    with pytest.raises(BeaconError, match="torn"):
        BeaconReader(page).read()


@given(st.lists(st.integers(0, 400), max_size=6))
def test_no_step_is_missed_by_a_reader_that_is_less_than_a_ring_behind(bursts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "beacon"
        create(path)
        writer, reader = BeaconWriter(path), BeaconReader(path)
        step = 0
        for burst in bursts:
            for _ in range(burst):
                step += 1
                writer.record(record(step))
            got = [r.step for r in reader.new_steps()]
            assert got == list(range(step - min(burst, RING_STEPS) + 1, step + 1))


def test_a_loss_that_is_not_finite_survives_the_page(page: Path) -> None:
    writer, reader = BeaconWriter(page), BeaconReader(page)

    writer.record(record(1, math.nan))

    assert math.isnan(reader.new_steps()[0].loss)


def test_a_page_of_something_else_is_refused(page: Path) -> None:
    page.write_bytes(b"x" * PAGE_BYTES)

    with pytest.raises(BeaconError, match="magic"):
        BeaconReader(page).read()


def test_a_page_has_one_life(page: Path) -> None:
    with pytest.raises(FileExistsError):
        create(page)


def test_a_page_has_all_its_memory_from_the_start(page: Path) -> None:
    # One that got it at first touch would be the end of the rank where there is none left.
    assert page.stat().st_blocks * 512 >= PAGE_BYTES


def test_a_page_for_which_there_is_no_room_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            create(tmp_path / "beacon")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(tmp_path.iterdir()) == []
