"""Who owns a node's folder in shared memory."""

from pathlib import Path

import pytest

from orchestrator.agent.memory import LOCK_NAME, Memory, MemoryInUseError


def test_a_folder_is_made_for_its_owner_only_and_removed_with_all_that_is_in_it(
    tmp_path: Path,
) -> None:
    memory = Memory(tmp_path / "run" / "node-0")
    (memory.path / "beacons").mkdir()
    (memory.path / "beacons" / "1").touch()

    assert memory.path.stat().st_mode & 0o777 == 0o700
    memory.remove()
    assert not memory.path.exists()


def test_a_live_owner_keeps_its_folder_and_what_is_in_it(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "node-0")
    (memory.path / "slot").write_bytes(b"x")

    with pytest.raises(MemoryInUseError, match=r"process \d+ owns"):
        Memory(tmp_path / "node-0")

    assert (memory.path / "slot").exists()
    memory.remove()


def test_what_a_dead_owner_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "node-0"
    (folder / "beacons").mkdir(parents=True)
    (folder / "rank-00000.slot-0").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path)
    (folder / LOCK_NAME).write_text("4711\n")
    folder.chmod(0o755)

    memory = Memory(folder)

    assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path.exists()
    memory.remove()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_of_ours_is_not_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "node-0"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(b"")

    with pytest.raises((MemoryInUseError, FileExistsError)):
        Memory(path)

    assert path.exists()
