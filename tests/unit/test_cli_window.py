"""A stretch of a journal is found by its time, and told as by whoever reads all of it."""

from pathlib import Path

import pytest

from orchestrator.cli import window
from orchestrator.cli.history import History
from orchestrator.core import journal
from orchestrator.core.journal import JournalError
from orchestrator.protocol.ids import Seconds
from orchestrator.worlds.folder import RunFolder
from tests.conftest import Cluster
from tests.journals import succeeded, write


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return succeeded()


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(window, "NEAR_BYTES", 256)
    monkeypatch.setattr(window, "SLACK_S", 0.01)
    return write(cluster, tmp_path / "run")


def test_every_stretch_has_all_that_happened_in_it(cluster: Cluster, folder: RunFolder) -> None:
    moments = sorted({entry.event.at for entry in cluster.entries})
    assert len(moments) > 20
    for start, end in zip(moments[::3], moments[4::3], strict=False):
        found = list(window.entries(folder.journal, start, end))

        wanted = [e for e in cluster.entries if start <= e.event.at <= end]
        first = found.index(wanted[0])
        assert found[first : first + len(wanted)] == wanted


def test_little_is_read_of_what_was_before(cluster: Cluster, folder: RunFolder) -> None:
    last = cluster.entries[-1]

    found = list(window.entries(folder.journal, last.event.at, last.event.at))

    assert found[-1] == last
    assert len(found) < len(cluster.entries) / 4


def test_history_of_a_stretch_is_that_of_the_whole(cluster: Cluster, folder: RunFolder) -> None:
    (incident,) = cluster.state.incidents
    assert incident.resumed_at is not None
    whole, part = History(), History()
    for entry in cluster.entries:
        whole.take(entry)
    for entry in window.entries(folder.journal, incident.since, incident.resumed_at):
        part.take(entry)

    told = part.between(incident.since, incident.resumed_at)

    assert told == whole.between(incident.since, incident.resumed_at)
    assert len(told) > 3


def test_a_torn_end_ends_a_stretch_and_damage_in_it_is_named(
    cluster: Cluster, folder: RunFolder
) -> None:
    data = folder.journal.read_bytes()
    start, end = Seconds(0.0), cluster.entries[-1].event.at
    folder.journal.write_bytes(data[:-30])
    assert len(list(window.entries(folder.journal, start, end))) == len(cluster.entries) - 1

    line = journal.line(cluster.entries[10])
    begin = data.index(line)
    folder.journal.write_bytes(data.replace(line, line.replace(b"at", b"ta", 1)))

    with pytest.raises(JournalError, match=f"line at byte {begin} is damaged: checksum is"):
        list(window.entries(folder.journal, start, end))
