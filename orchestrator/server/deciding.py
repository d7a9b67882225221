"""Takes a run over from what is on disk, and decides from then on."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from orchestrator import compose
from orchestrator.core import journal, snapshot
from orchestrator.core.controller import Controller
from orchestrator.core.events import Event
from orchestrator.core.snapshot import SnapshotError
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server import snapshots
from orchestrator.server.counts import Counts
from orchestrator.server.journal import JournalFile
from orchestrator.server.metrics import Watched
from orchestrator.server.snapshots import Snapshots
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.told import Told

log = logging.getLogger("holdfast.controller")


class TakenOver(NamedTuple):
    """A controller that stands where the last one stood."""

    controller: Controller
    file: JournalFile
    told: Told
    """What the world resumes from."""
    counts: Counts
    """Of what is on record."""


def take_over(folder: RunFolder, run: TrainingRun) -> TakenOver:
    """Bring a controller to where the last one stood, from its newest snapshot if that is of use.

    Raises:
        JournalError: if the journal can not be trusted, or it would have decided otherwise.
    """
    if folder.snapshot.exists():
        try:
            return _from_snapshot(folder, run)
        except journal.JournalError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever is wrong with what only saves time
            log.warning("snapshot passed over, it %s: %s", error, folder.snapshot)
    file = JournalFile(folder.journal, run)
    controller = compose.controller(run)
    mismatches = journal.replay(controller, file.entries)
    if mismatches:
        file.close()
        raise journal.JournalError(
            f"event {mismatches[0].seq} leads to other decisions than it did: {folder.journal}"
        )
    return TakenOver(controller, file, Told(file.entries), Counts().take_all(file.entries))


def _from_snapshot(folder: RunFolder, run: TrainingRun) -> TakenOver:
    taken = snapshots.read(folder.snapshot, run.metadata.name)
    controller = snapshot.restore(taken.body, compose.controller(run))
    file = JournalFile(folder.journal, run, after=taken.mark)
    try:
        _replay(controller, file, taken.mark.seq)
    except Exception:
        file.close()
        raise
    log.info("went on from event %d, %d replayed", taken.mark.seq, len(file.entries))
    counts = taken.counts.take_all(file.entries)
    return TakenOver(controller, file, Told([*taken.told, *file.entries]), counts)


def _replay(controller: Controller, file: JournalFile, seq: int) -> None:
    """Live through what is behind a snapshot. The journal from its beginning has the last word.

    Raises:
        SnapshotError: if it is decided otherwise than it was.
    """
    mismatches = journal.replay(controller, file.entries)
    if mismatches:
        first = mismatches[0].seq
        raise SnapshotError(f"of event {seq} decides event {first} otherwise than it was decided")


class Deciding:
    """Decides, puts on record, carries out: in this order, for every event.

    Args:
        taken: who decides, and where it goes on record.
        world: where it is carried out.
        kept: takes what the controller knows from time to time.

    Attributes:
        watched: who decides, for whoever wants to look at its state.
    """

    def __init__(self, taken: TakenOver, world: AgentWorld, kept: Snapshots) -> None:
        self._taken, self._world, self._kept = taken, world, kept
        self.watched = Watched(taken.controller, taken.counts)

    def handle(self, event: Event) -> None:
        """Decide about one event.

        Raises:
            OSError: if there is no room for it on the disk; then nothing of it was carried out.
                No room for a snapshot is no reason.
        """
        began = time.perf_counter()
        decisions = self.watched.handle(event)
        spent_s = time.perf_counter() - began
        controller, file, told, counts = self._taken
        told.add(file.append(event, decisions))
        for decision in decisions:
            self._world.carry_out(decision)
        if self._kept.spent(spent_s, controller.state):
            self._kept.take(controller, file, told.entries(), counts)
