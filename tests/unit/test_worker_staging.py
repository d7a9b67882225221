"""A copy is handed over once, when it is made and somebody has waited for it, in either order."""

import threading
from pathlib import Path

import pytest

from orchestrator.worker import MisconfiguredError, Slot
from orchestrator.worker.staging import Staging

BOUND_S = 20.0


class Program:
    """Has one save, whose copy begins to be made when it is let."""

    def __init__(self, folder: Path) -> None:
        self.state = b"step 1"
        self.slot = Slot(0, folder / "slot", 4096)
        self.let, self.sealed = threading.Event(), threading.Event()
        self.handed: list[str] = []
        self.staging = Staging(self.slot, 1, self.copy, self.seal, self.handed.append)

    def copy(self, buffer: memoryview) -> None:
        assert self.let.wait(BOUND_S)
        buffer[:6] = self.state

    def seal(self, buffer: memoryview) -> str:
        self.sealed.set()
        return bytes(buffer[:6]).decode()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_who_waits_while_it_is_copied_goes_on_when_it_is(program: Program) -> None:
    program.staging.start()
    waiting = threading.Thread(target=program.staging.wait)
    waiting.start()
    assert not program.handed
    program.let.set()
    waiting.join(BOUND_S)
    program.state = b"step 2"
    program.staging.join()

    assert not waiting.is_alive()
    assert program.handed == ["step 1"]


def test_what_is_ready_before_somebody_waits_is_handed_over_by_who_waits(
    program: Program,
) -> None:
    program.let.set()
    program.staging.start()
    program.staging.join()
    assert not program.handed, "an update may have come in between"

    program.staging.wait()
    program.staging.wait()

    assert program.handed == ["step 1"]


def test_a_step_that_moved_what_nobody_waited_for_is_refused(program: Program) -> None:
    program.let.set()
    program.staging.start()
    program.staging.join()

    program.staging.require_waited(1)
    with pytest.raises(MisconfiguredError, match="moved the state of step 1"):
        program.staging.require_waited(2)
    program.staging.wait()
    program.staging.require_waited(2)


def test_a_copy_that_fails_is_told_to_who_waits_and_sealed_by_nobody(program: Program) -> None:
    def broken() -> bytes:
        raise ValueError("no such tensor")

    staging = Staging(program.slot, 1, lambda _: broken(), program.seal, program.handed.append)
    staging.start()

    with pytest.raises(ValueError, match="no such tensor"):
        staging.wait()
    staging.join()
    assert not program.handed
    assert not program.sealed.is_set()
