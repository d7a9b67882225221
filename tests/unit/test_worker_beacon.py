import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.worker.beacon import (
    PAGE_BYTES,
    RING_STEPS,
    BeaconError,
    BeaconReader,
    BeaconWriter,
    StepRecord,
    create,
)


def record(step: int, loss: float = 2.5) -> StepRecord:
    return StepRecord(Generation(1), Step(step), loss, 1.0, 100, 0.1)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "beacon"
    create(path)
    return path


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


def test_a_reader_stopped_between_any_two_writes_sees_a_whole_reading(page: Path) -> None:
    writer = BeaconWriter(page)
    writer.update(step=Step(5), collectives=5)
    image = page.read_bytes()
    writer.update(step=Step(6), collectives=6)
    after = page.read_bytes()

    changed = [i for i in range(PAGE_BYTES) if image[i] != after[i]]
    for cut in range(len(changed) + 1):
        mixed = bytearray(image)
        # The copy is written before the word that makes it current, in address order last.
        for i in sorted(changed, key=lambda i: (i < 24, i))[:cut]:
            mixed[i] = after[i]
        torn = page.with_name(f"torn-{cut}")
        torn.write_bytes(mixed)
        reading = BeaconReader(torn).read()
        assert reading.step == reading.collectives


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
