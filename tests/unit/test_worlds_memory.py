"""Whose memory is freed by a run that starts, and whose is not, whatever happens at once."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from orchestrator.agent.memory import LOCK_NAME, Memory
from orchestrator.worlds import memory
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.memory import MemoryNotOursError, RunMemory, memory_of, sweep


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for this machine's shared memory."""
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(memory, "SHARED_MEMORY", shared)
    return shared


def left_by(run: RunFolder, *nodes: str) -> Path:
    """Make what a run leaves that is killed with all its agents."""
    for node in nodes:
        agent = Memory(memory_of(run) / node)
        (agent.path / "rank-00000.slot-0").write_bytes(b"state")
        os.close(agent._lock)
    return memory_of(run)


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    return left_by(RunFolder(tmp_path / "dead"), "node-0", "node-1")


def test_the_memory_of_a_dead_run_is_freed_and_nothing_else(
    shared: Path, dead: Path, tmp_path: Path
) -> None:
    others = [
        shared / "holdfast-test-abcdefgh",
        shared / f"holdfast-{os.getuid() + 1}-{'0' * 16}",
        shared / f"holdfast-{os.getuid()}-{'0' * 15}",
    ]
    for path in others:
        path.mkdir()
    link = shared / f"holdfast-{os.getuid()}-{'1' * 16}"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    link.symlink_to(tmp_path / "there")
    file = shared / f"holdfast-{os.getuid()}-{'2' * 16}"
    file.touch()

    assert sweep() == [dead]

    assert sorted(shared.iterdir()) == sorted([*others, link, file])
    assert (tmp_path / "there" / "file").exists()


def test_what_a_removal_left_that_was_cut_short_is_freed(dead: Path) -> None:
    (dead / "node-0" / LOCK_NAME).unlink()

    assert sweep() == [dead]


def test_a_run_of_which_one_agent_lives_keeps_the_memory_of_all(dead: Path) -> None:
    agent = Memory(dead / "node-1")

    assert sweep() == []

    assert (dead / "node-0" / "rank-00000.slot-0").exists()
    agent.remove()
    assert sweep() == [dead]


def test_a_run_whose_agents_are_all_dead_keeps_its_memory_while_its_command_lives(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path / "run")
    mine = RunMemory(run)
    mine.claim()
    left_by(run, "node-0")

    assert sweep() == []

    mine.remove()
    assert not mine.path.exists()


def test_a_run_that_was_killed_is_claimed_again_with_what_its_living_agents_have(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path / "run")
    left_by(run, "node-0")

    again = RunMemory(run)
    again.claim()

    assert (again.path / "node-0" / "rank-00000.slot-0").exists()
    again.remove()


def test_a_run_whose_folder_is_being_freed_waits_and_makes_it_anew(
    dead: Path, tmp_path: Path
) -> None:
    sweeper = os.open(dead, os.O_RDONLY)
    fcntl.flock(sweeper, fcntl.LOCK_EX)
    mine = RunMemory(RunFolder(tmp_path / "dead"))
    claiming = threading.Thread(target=mine.claim)
    claiming.start()
    time.sleep(0.1)
    assert claiming.is_alive()
    for node in dead.iterdir():
        for file in node.iterdir():
            file.unlink()
        node.rmdir()
    dead.rmdir()

    os.close(sweeper)
    claiming.join(10)

    assert list(mine.path.iterdir()) == []
    mine.remove()


def test_a_folder_that_stays_locked_is_waited_for_and_then_refused(
    dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CLAIM_S", 0.1)
    other = os.open(dead, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    mine = RunMemory(RunFolder(tmp_path / "dead"))
    with pytest.raises(MemoryNotOursError, match="locked by others"):
        mine.claim()

    mine.remove()
    assert (dead / "node-0").exists()
    os.close(other)


def test_runs_that_start_and_end_at_once_never_free_each_others_memory(
    shared: Path, tmp_path: Path
) -> None:
    wrong: list[str] = []

    def live(name: str) -> None:
        run = RunFolder(tmp_path / name)
        for life in range(60):
            mine = RunMemory(run)
            mine.claim()
            sweep()
            agent = Memory(mine.path / "node-0")
            slot = agent.path / "slot"
            slot.write_text(name)
            sweep()
            if slot.read_text() != name:
                wrong.append(f"{name} lost its memory in life {life}")
            if life % 2:
                mine.remove()
            # Else it is killed: whoever sweeps next frees it, unless its next life is faster.
            for lock in {agent._lock, mine._lock} - {-1}:
                os.close(lock)

    threads = [threading.Thread(target=live, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert wrong == []
    sweep()
    assert list(shared.iterdir()) == []
