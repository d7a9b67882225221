"""Who goes on from a snapshot stands where who lived through everything stands, to the byte."""

from typing import Any

import msgspec
import pytest

from orchestrator import compose
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.holdings import Copies
from orchestrator.core.journal import Entry
from orchestrator.core.snapshot import SnapshotError
from orchestrator.protocol.runfile import TrainingRun
from tests.conftest import Cluster
from tests.scenarios.test_golden import DASHES, FOLDER, STORIES, job_of

CUTS = 7
"""Snapshots of one story, evenly spread over its events."""


def story(name: str) -> tuple[TrainingRun, list[Entry]]:
    """Return the run of a golden scenario, and what was put on record of it."""
    given = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition(f"{DASHES}\n")[0]
    job = job_of(given)
    job.conduct()
    return msgspec.convert(job.run, TrainingRun), job.journal


def after(run: TrainingRun, entries: list[Entry]) -> Controller:
    lived = compose.controller(run)
    assert journal.replay(lived, entries) == []
    return lived


@pytest.mark.parametrize("name", STORIES)
def test_a_story_goes_on_from_a_snapshot_as_it_did(name: str) -> None:
    run, entries = story(name)
    whole = snapshot.take(after(run, entries))
    for cut in range(1, len(entries), max(len(entries) // CUTS, 1)):
        taken = snapshot.take(after(run, entries[:cut]))

        later = snapshot.restore(taken, compose.controller(run))

        assert snapshot.take(later) == taken
        assert journal.replay(later, entries[cut:]) == []
        assert snapshot.take(later) == whole


@pytest.fixture
def taken(cluster: Cluster) -> bytes:
    cluster.start()
    cluster.train(5)
    return snapshot.take(cluster.controller)


def fresh(cluster: Cluster) -> Controller:
    return compose.controller(cluster.run)


def test_what_is_cut_short_or_nothing_of_ours_is_refused(cluster: Cluster, taken: bytes) -> None:
    for data in (b"", b"\xc1", taken[:-1], taken[1:], msgspec.msgpack.encode(["L", []])):
        with pytest.raises(SnapshotError, match=r"can not be read|expected a controller"):
            snapshot.restore(data, fresh(cluster))


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "orchestrator.core.journal:zlib.decompress",
        "orchestrator.core.journal:msgspec.Struct",
        "orchestrator.core.nothing:Here",
        "orchestrator.core.snapshot:take",
        "orchestrator.cli.main:main",
    ],
)
def test_a_class_of_others_is_not_made_whatever_its_name(cluster: Cluster, name: str) -> None:
    for node in (["O", name, []], ["C", name, []], ["E", name, 1], ["N", name, []]):
        with pytest.raises(SnapshotError, match="no class of this program"):
            snapshot.restore(msgspec.msgpack.encode(node), fresh(cluster))


@pytest.mark.parametrize(
    "node",
    [
        ["E", "orchestrator.core.holdings:Copies", 10**8],
        ["N", "orchestrator.core.ledger:Ledger", []],
        ["C", "orchestrator.core.ledger:Ledger", []],
    ],
)
def test_nothing_is_called_but_what_makes_values(cluster: Cluster, node: list[Any]) -> None:
    with pytest.raises(SnapshotError, match="no class of this program"):
        snapshot.restore(msgspec.msgpack.encode(node), fresh(cluster))


def test_a_set_of_what_can_change_is_not_taken(cluster: Cluster) -> None:
    cluster.state.behind = {Copies(2)}  # type: ignore[arg-type]

    with pytest.raises(SnapshotError, match="a set of what can change"):
        snapshot.take(cluster.controller)


def test_every_flipped_byte_is_refused_or_harmless(cluster: Cluster, taken: bytes) -> None:
    """Files have a digest; this is what is left if somebody writes a matching one."""
    for at in range(0, len(taken), 97):
        data = bytearray(taken)
        data[at] ^= 0xFF
        try:
            found = snapshot.restore(bytes(data), fresh(cluster))
        except SnapshotError:
            continue
        assert isinstance(found, Controller)


def test_what_is_none_of_ours_can_not_be_taken(cluster: Cluster) -> None:
    cluster.state.way = object()  # type: ignore[assignment]

    with pytest.raises(SnapshotError, match="builtins:object"):
        snapshot.take(cluster.controller)
