"""A copy is handed over once, when it is made and somebody has waited for it, in either order."""

import threading
from pathlib import Path

import pytest

from orchestrator.worker import Aborted, MisconfiguredError, SaveStuckError, Slot
from orchestrator.worker.staging import Staging

BOUND_S = 20.0


class Program:
    """Has one save, whose copy begins to be made when it is let."""

    def __init__(self, folder: Path) -> None:
        self.state = b"step 1"
        self.slot = Slot(0, folder / "slot", 4096)
        self.let, self.sealed = threading.Event(), threading.Event()
        self.handed: list[str] = []
        self.given_back = threading.Event()
        self.staging = self.save()

    def save(self, **more: float) -> Staging:
        hand_over, give_back = self.handed.append, self.given_back.set
        return Staging(self.slot, 1, self.copy, self.seal, hand_over, give_back, **more)

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

    program.copy = lambda _: broken()  # type: ignore[method-assign,assignment]
    staging = program.save()
    staging.start()

    with pytest.raises(ValueError, match="no such tensor"):
        staging.wait()
    staging.join()
    assert not program.handed
    assert not program.sealed.is_set()


def test_a_copy_that_is_late_is_given_up_and_its_slot_is_free_once_nobody_writes_there(
    program: Program,
) -> None:
    staging = program.save(within_s=0.05)
    staging.start()

    assert not staging.wait()
    assert not staging.wait()
    staging.require_waited(2)
    assert not program.given_back.is_set(), "the copy is still being made"
    with pytest.raises(SaveStuckError, match="saves step 1 is not done"):
        staging.join()
    program.let.set()

    assert staging.ends(BOUND_S)
    assert program.given_back.is_set()
    assert not program.handed
    assert not program.sealed.is_set()


def test_who_is_told_to_leave_does_not_wait_for_a_copy(program: Program) -> None:
    def leave() -> None:
        raise Aborted("generation 1 is over")

    program.staging.start()
    with pytest.raises(Aborted):
        program.staging.wait(leave)
    program.let.set()
    program.staging.join()

    assert not program.handed, "nobody has waited for it"
