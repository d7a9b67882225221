import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli.follow import Follower
from orchestrator.core import journal, snapshot
from orchestrator.core.phases import RunPhase
from orchestrator.worlds.folder import RunFolder
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import killed_rank, succeeded, text, write, write_decided


def test_a_journal_that_does_not_exist_yet_is_nothing_to_show(tmp_path: Path) -> None:
    follower = Follower(RunFolder(tmp_path / "run"))

    assert follower.poll() is None
    assert follower.header is None


def test_a_follower_stands_where_the_controller_stood(tmp_path: Path) -> None:
    cluster = killed_rank()
    follower = Follower(write(cluster, tmp_path / "run"))

    state = follower.poll()

    assert state is not None
    assert state.ledger.spans() == cluster.state.ledger.spans()
    assert state.losses == cluster.state.losses
    assert follower.entries == len(cluster.entries)
    assert follower.torn == ""


def test_what_a_snapshot_knows_is_not_read_from_the_journal_again(tmp_path: Path) -> None:
    cluster = killed_rank()
    follower = Follower(write_decided(cluster, tmp_path, 40))

    follower.poll()

    assert follower.controller is not None
    assert follower.skipped == 40
    assert follower.entries == len(cluster.entries)
    assert snapshot.take(follower.controller) == snapshot.take(cluster.controller)


def test_whoever_wants_every_entry_gets_them_from_the_first_on(tmp_path: Path) -> None:
    cluster = killed_rank()
    seen: list[int] = []
    follower = Follower(write_decided(cluster, tmp_path, 40), lambda entry: seen.append(entry.seq))

    follower.poll()

    assert seen == [entry.seq for entry in cluster.entries]
    assert follower.skipped == 0


def damaged(folder: RunFolder) -> None:
    data = bytearray(folder.snapshot.read_bytes())
    data[-20] ^= 1
    folder.snapshot.write_bytes(data)


def of_another_journal(folder: RunFolder) -> None:
    folder.journal.write_bytes(text(succeeded(run=runfiles.text())))


def of_lines_that_were_lost(folder: RunFolder) -> None:
    with folder.journal.open("rb") as file:
        kept = b"".join(file.readline() for _ in range(30))
    folder.journal.write_bytes(kept)


@pytest.mark.parametrize("spoil", [damaged, of_another_journal, of_lines_that_were_lost])
def test_a_snapshot_that_is_of_no_use_is_passed_over_and_the_journal_is_read(
    tmp_path: Path, spoil: Callable[[RunFolder], None]
) -> None:
    folder = write_decided(killed_rank(), tmp_path / "run", 40)
    spoil(folder)
    (tmp_path / "alone").mkdir()
    alone = RunFolder(tmp_path / "alone")
    alone.journal.write_bytes(folder.journal.read_bytes())
    follower, whole = Follower(folder), Follower(alone)

    follower.poll()
    whole.poll()

    assert follower.controller is not None
    assert whole.controller is not None
    assert follower.skipped == 0
    assert snapshot.take(follower.controller) == snapshot.take(whole.controller)


def test_a_journal_that_goes_on_behind_its_snapshot_is_followed(tmp_path: Path) -> None:
    cluster = killed_rank()
    follower = Follower(write_decided(cluster, tmp_path, 40))
    follower.poll()
    known = len(cluster.entries)
    cluster.train(5)
    with follower.folder.journal.open("ab") as file:
        file.write(b"".join(map(journal.line, cluster.entries[known:])))

    follower.poll()

    assert follower.controller is not None
    assert follower.entries == len(cluster.entries)
    assert snapshot.take(follower.controller) == snapshot.take(cluster.controller)


DATA = text(killed_rank())


@settings(max_examples=20)
@given(st.lists(st.integers(0, len(DATA) - 1), max_size=5).map(sorted))
def test_a_journal_that_grows_in_any_pieces_is_followed_to_its_end(cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(Path(root))
        follower = Follower(folder)
        for start, end in itertools.pairwise([0, *cuts, len(DATA)]):
            with folder.journal.open("ab") as file:
                file.write(DATA[start:end])
            state = follower.poll()
            assert bool(follower.torn) == (end > 0 and DATA[end - 1 : end] != b"\n")

        assert state is not None
        assert state.reached_step == 30


def test_a_torn_end_is_named_and_read_again_once_the_next_controller_has_cut_it(
    tmp_path: Path,
) -> None:
    cluster = killed_rank()
    folder = write(cluster, tmp_path / "run")
    data = folder.journal.read_bytes()
    folder.journal.write_bytes(data[:-30])
    follower = Follower(folder)
    follower.poll()
    assert "torn" in follower.torn
    assert follower.entries == len(cluster.entries) - 1

    good = journal.read(data[:-30]).good_bytes
    with folder.journal.open("r+b") as file:
        file.truncate(good)
        file.seek(good)
        file.write(journal.line(cluster.entries[-1]))
    follower.poll()

    assert follower.torn == ""
    assert follower.entries == len(cluster.entries)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [*lines[:5], b"x" + lines[5][1:], *lines[6:]], "line 6 is damaged"),
        (lambda lines: [*lines[:5], *lines[6:]], "line 6 has event 6, expected 5"),
        (lambda lines: lines[1:], "line 1 is no header"),
        (lambda lines: [lines[0], *lines], "line 2 is a second header"),
    ],
    ids=["a bit flipped", "a line is missing", "no header", "two headers"],
)
def test_a_journal_that_can_not_be_trusted_is_refused_with_the_line(
    damage: object, says: str, tmp_path: Path
) -> None:
    folder = write(killed_rank(), tmp_path / "run")
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    assert callable(damage)
    folder.journal.write_bytes(b"".join(damage(lines)))

    with pytest.raises(journal.JournalError, match=says) as caught:
        Follower(folder).poll()

    assert str(folder.journal) in str(caught.value)


def test_a_run_that_begins_another_life_is_followed_from_its_beginning(tmp_path: Path) -> None:
    folder = write(killed_rank(), tmp_path / "run")
    follower = Follower(folder)
    follower.poll()

    folder.journal.rename(folder.root / "journal.1")
    folder.journal.write_bytes(text(succeeded()))
    state = follower.poll()

    assert state is not None
    assert state.phase is RunPhase.SUCCEEDED
    assert state.run.metadata.name == "short"


def test_every_entry_is_handed_on_once_and_after_the_state_took_it_in(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.start()
    folder = write(cluster, tmp_path / "run")
    seen = []
    follower = Follower(folder, lambda entry: seen.append((entry.seq, follower.entries)))

    follower.poll()
    cluster.train(3)
    folder.journal.write_bytes(text(cluster))
    follower.poll()

    assert seen == [(n, n) for n in range(1, len(cluster.entries) + 1)]


def _newer_header(lines: list[bytes]) -> bytes:
    record, _ = journal.read_line(lines[0])
    assert isinstance(record, journal.Header)
    return journal.line(journal.Header(version=journal.VERSION + 1, run_id="r", run=record.run))


def _new_kind_of_event(lines: list[bytes]) -> bytes:
    body = lines[1].partition(b" ")[2].rstrip(b"\n").replace(b'"type":"', b'"type":"New', 1)
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)


@pytest.mark.parametrize(
    ("line", "made", "says"),
    [
        (0, _newer_header, f"line 1: version {journal.VERSION + 1}, expected {journal.VERSION}"),
        (1, _new_kind_of_event, "line 2: a line of another version: "),
    ],
    ids=["version", "event"],
)
def test_a_journal_of_a_newer_version_is_not_taken_for_a_damaged_one(
    line: int, made: Callable[[list[bytes]], bytes], says: str, tmp_path: Path
) -> None:
    folder = write(killed_rank(), tmp_path / "run")
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    lines[line] = made(lines)
    folder.journal.write_bytes(b"".join(lines))

    with pytest.raises(journal.JournalVersionError, match=says) as caught:
        Follower(folder).poll()

    assert "cut" not in caught.value.hint
    with pytest.raises(journal.JournalVersionError):
        journal.read(folder.journal.read_bytes())
