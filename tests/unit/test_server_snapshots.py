"""A successor goes on from the newest snapshot, if that is of use, and stands where it would."""

import logging
from pathlib import Path

import pytest

from orchestrator import compose
from orchestrator.core import snapshot
from orchestrator.core.events import CheckpointCommitted, Tick
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.server import snapshots
from orchestrator.server.counts import Counts
from orchestrator.server.deciding import TakenOver, take_over
from orchestrator.server.journal import JournalFile, LostJournalError
from orchestrator.server.snapshots import Snapshots
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.told import Told
from tests.conftest import Cluster
from tests.journals import write_decided

SNAPSHOT_AT = 40
"""Event after which it is taken."""


@pytest.fixture
def folder(tmp_path: Path, cluster: Cluster) -> RunFolder:
    """The folder of a run in which a rank was killed, with a snapshot that is not the newest."""
    cluster.start()
    cluster.train(10)
    cluster.tell(CheckpointCommitted(at=cluster.at(), step=Step(5), epoch=Generation(1), key="5"))
    cluster.train(20)
    cluster.hold(30)
    cluster.exit(2)
    cluster.resume()
    cluster.train(20)
    assert len(cluster.entries) > SNAPSHOT_AT + 20
    return write_decided(cluster, tmp_path, SNAPSHOT_AT)


def replayed(taken: TakenOver) -> int:
    return len(taken.file.entries)


def knows(taken: TakenOver) -> tuple[bytes, list[int], Counts]:
    taken.file.close()
    told = [entry.seq for entry in taken.told.entries()]
    return snapshot.take(taken.controller), told, taken.counts


@pytest.fixture
def whole(folder: RunFolder, cluster: Cluster, tmp_path: Path) -> tuple[bytes, list[int], Counts]:
    """What is known to whoever replays all of the journal."""
    elsewhere = RunFolder(tmp_path / "elsewhere")
    elsewhere.root.mkdir()
    elsewhere.journal.write_bytes(folder.journal.read_bytes())
    taken = take_over(elsewhere, cluster.run)
    assert replayed(taken) == len(cluster.entries)
    return knows(taken)


def test_only_what_is_behind_the_snapshot_is_replayed_and_all_is_known(
    folder: RunFolder, cluster: Cluster, whole: tuple[bytes, list[int], Counts]
) -> None:
    taken = take_over(folder, cluster.run)

    assert replayed(taken) == len(cluster.entries) - SNAPSHOT_AT
    assert knows(taken) == whole


def test_the_journal_is_gone_on_with_at_its_end(folder: RunFolder, cluster: Cluster) -> None:
    taken = take_over(folder, cluster.run)
    event = Tick(at=Seconds(cluster.now + 1))
    taken.file.append(event, taken.controller.handle(event))
    taken.file.close()
    folder.snapshot.unlink()

    again = take_over(folder, cluster.run)

    assert again.file.entries[-1].seq == len(cluster.entries) + 1
    assert knows(again)[0] == snapshot.take(taken.controller)


def passed_over(folder: RunFolder, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> TakenOver:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        taken = take_over(folder, cluster.run)
    assert "snapshot passed over" in caplog.text
    assert str(folder.snapshot) in caplog.text
    return taken


def test_wherever_a_bit_of_it_flips_the_whole_journal_is_replayed(
    folder: RunFolder,
    cluster: Cluster,
    whole: tuple[bytes, list[int], Counts],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sound = folder.snapshot.read_bytes()
    for at in (*range(0, 600, 60), len(sound) // 2, len(sound) - 1):
        folder.snapshot.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])

        assert knows(passed_over(folder, cluster, caplog)) == whole


@pytest.mark.parametrize("size", [0, 1, 200, -1])
def test_one_that_is_cut_short_is_passed_over(
    folder: RunFolder,
    cluster: Cluster,
    whole: tuple[bytes, list[int], Counts],
    caplog: pytest.LogCaptureFixture,
    size: int,
) -> None:
    folder.snapshot.write_bytes(folder.snapshot.read_bytes()[:size])

    assert knows(passed_over(folder, cluster, caplog)) == whole


@pytest.mark.parametrize("left", [SNAPSHOT_AT - 5, 1, 0])
def test_a_journal_that_has_lost_what_was_on_record_is_not_gone_on_with(
    folder: RunFolder, cluster: Cluster, left: int
) -> None:
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    folder.journal.write_bytes(b"".join(lines[:left]))
    if left == 0:
        folder.journal.unlink()

    with pytest.raises(LostJournalError, match=f"event {SNAPSHOT_AT}"):
        take_over(folder, cluster.run)

    assert "remove the snapshot" in LostJournalError.hint
    folder.snapshot.unlink()
    taken = take_over(folder, cluster.run)
    taken.file.close()
    assert replayed(taken) == max(left - 1, 0)


def test_one_that_makes_a_replay_raise_is_passed_over(
    folder: RunFolder, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    taken = snapshots.read(folder.snapshot, cluster.run.metadata.name)
    strange = snapshot.restore(taken.body, compose.controller(cluster.run))
    strange.state.nodes.clear()
    again = taken._replace(body=snapshot.take(strange))
    snapshots.write(folder.snapshot, cluster.run.metadata.name, again)

    assert replayed(passed_over(folder, cluster, caplog)) == len(cluster.entries)


def test_one_of_another_journal_is_passed_over(
    folder: RunFolder, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    size = folder.journal.stat().st_size
    folder.journal.unlink()
    other, now = compose.controller(cluster.run), 0.0
    file = JournalFile(folder.journal, cluster.run)
    while folder.journal.stat().st_size < size:
        event = Tick(at=Seconds(now := now + 0.5))
        file.append(event, other.handle(event))
    file.close()

    assert replayed(passed_over(folder, cluster, caplog)) > SNAPSHOT_AT


@pytest.mark.parametrize("program", ["another", ""])
def test_one_of_another_program_or_one_that_is_not_on_the_disk_is_passed_over(
    folder: RunFolder,
    cluster: Cluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
) -> None:
    monkeypatch.setattr(snapshots, "PROGRAM", program)

    assert replayed(passed_over(folder, cluster, caplog)) == len(cluster.entries)


def test_one_that_would_decide_otherwise_is_passed_over(
    folder: RunFolder, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    taken = snapshots.read(folder.snapshot, cluster.run.metadata.name)
    strange = snapshot.restore(taken.body, compose.controller(cluster.run))
    strange.state.generation = Generation(7)
    again = taken._replace(body=snapshot.take(strange))
    snapshots.write(folder.snapshot, cluster.run.metadata.name, again)

    assert replayed(passed_over(folder, cluster, caplog)) == len(cluster.entries)


def test_without_room_the_old_one_stays_and_deciding_goes_on(
    folder: RunFolder, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    sound = folder.snapshot.read_bytes()
    taken = take_over(folder, cluster.run)
    in_the_way = folder.root / f".{folder.snapshot.name}"
    in_the_way.mkdir()
    kept = Snapshots(folder.snapshot, cluster.run.metadata.name)

    with caplog.at_level(logging.WARNING), pytest.raises(IsADirectoryError):
        snapshots.write(
            folder.snapshot, "steps", snapshots.read(folder.snapshot, cluster.run.metadata.name)
        )
    kept.take(taken.controller, taken.file, taken.told.entries(), Counts())

    taken.file.close()
    assert "no snapshot" in caplog.text
    assert folder.snapshot.read_bytes() == sound


def test_how_often_is_a_matter_of_what_it_costs(tmp_path: Path, cluster: Cluster) -> None:
    kept = Snapshots(tmp_path / "snapshot", "one")
    cluster.start()
    cluster.train(3)
    assert not kept.spent(snapshots.SPENT_MIN_S / 2, cluster.state)
    assert kept.spent(snapshots.SPENT_MIN_S, cluster.state)

    file = JournalFile(tmp_path / "journal", cluster.run)
    kept.take(cluster.controller, file, [], Counts())
    file.close()

    assert not kept.spent(snapshots.SPENT_MIN_S / 2, cluster.state)
    assert kept.spent(snapshots.DUE_MAX_S, cluster.state)
    cluster.exit(1)
    assert not kept.spent(snapshots.DUE_MAX_S, cluster.state)  # no time to lose


def test_what_a_world_resumes_from_is_little_and_the_newest(cluster: Cluster) -> None:
    cluster.start()
    for _ in range(4):
        cluster.train(10)
        cluster.hold(cluster.state.reached_step)
        cluster.exit(1)
        cluster.resume()

    kept = Told(cluster.entries).entries()

    started = [entry for entry in kept if "StartGeneration" in repr(entry.decisions)]
    assert [d.generation for entry in started for d in entry.decisions][-1] == 5
    assert len(started) == 2
    assert len(kept) <= 3
    assert Told(kept).entries() == kept
    assert [entry.seq for entry in kept] == sorted({entry.seq for entry in kept})
