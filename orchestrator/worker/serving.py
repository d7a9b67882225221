"""Gives a trainer one seat after the other, for as long as its agent has some."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import Seat
from orchestrator.worker.errors import (
    EXIT_MISCONFIGURED,
    Aborted,
    MisconfiguredError,
    PeerLostError,
)
from orchestrator.worker.sdk import Prepare, Worker


def serve(
    train: Callable[[Worker, Seat], None],
    rehearse: Callable[[], None] | None = None,
    prepare: Prepare | None = None,
) -> int:
    """Run `train` for one seat after the other until the agent has no more; return the exit code.

    `Aborted` and `PeerLostError` end a generation, not the process; any other exception is
    reported with its traceback and ends the process with code 1 (78 if misconfigured). So is it if
    `train` returns early, without `finished`.

    Args:
        train: one generation, from its seat to the last step, and to `Worker.finished`.
        rehearse: run once before the first wait by a process that was made for no seat: whatever a
            first step pays for only once should be paid for here, where nobody waits for it.
        prepare: called between seats with the job that a seat would be of; see `sdk.Prepare`. A
            spare node gets its data here, and not when training waits for it.
    """
    worker = Worker.connect()
    try:
        if rehearse is not None and worker.stands_by:
            rehearse()
        while (seat := worker.next_seat(prepare)) is not None:
            try:
                train(worker, seat)
                _require_finished(worker)
            except Aborted:
                continue
            except PeerLostError as error:
                worker.troubled(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the agent must hear of it
        try:
            # Before its log has it: whoever reads that there may order it to leave at once.
            worker.died(error)
        finally:
            traceback.print_exception(error)
        return EXIT_MISCONFIGURED if isinstance(error, MisconfiguredError) else 1
    return 0


def _require_finished(worker: Worker) -> None:
    """Refuse a trainer that left its seat by itself: it would look like a hang of nobody."""
    now = worker._beacon.now  # noqa: SLF001 - of this package, and all that its agent goes by
    if now.phase is not RankPhase.DONE and not worker.aborted:
        raise MisconfiguredError(
            f"train returned after step {now.step} without worker.finished(...)",
            hint="call it after the last step; let Aborted and PeerLostError fly out of train",
        )
