"""What a rank tells of state and products that are wrong, or may be."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import msgspec

from orchestrator.protocol.digests import KINDS, NONE, Kind, Taken
from orchestrator.protocol.ids import Rank, Step
from orchestrator.protocol.rank import DetectorOff, Diverged, Repaired
from orchestrator.worker.beacon import DigestRecord
from orchestrator.worker.connection import Connection

IT_IS_THE_DATA = "other ranks get the same: it is the data"
COMPUTED_AGAIN = "is thrown away and computed again"
"""What the log of rank 0 says of a step that stood out, and of one that came to nothing."""


class Findings(Connection):
    """One rank's."""

    def digested(self, taken: Taken, digests: Mapping[Kind, int]) -> None:
        """Report digests, each in [0, 2**64); call it before `step_done` of the same step.

        Whatever is in `protocol.digests.SHARED` is compared with that of the ranks which hold the
        same shard; when it differs, the run goes back behind that, without whoever was outvoted.
        """
        values = tuple(digests.get(kind, NONE) for kind in KINDS)
        self._beacon.digest(DigestRecord(self._generation, taken, values))

    def diverged(
        self,
        step: int,
        *,
        since: int,
        ranks: Sequence[int],
        proven: bool,
        evidence: str,
        of_data: bool = False,
    ) -> None:
        """Report that ranks found together who of them computes wrongly; one or two should tell.

        Args:
            step: the last one that was complete.
            since: the last step whose state is known to be good.
            ranks: who does, or may do.
            proven: whether it was these for certain.
            evidence: how it showed, in words.
            of_data: whether it is what they read, and not what they compute on.
        """
        self._send(
            Diverged(
                generation=self._generation,
                step=Step(step),
                since=Step(since),
                ranks=tuple(map(Rank, ranks)),
                proven=proven,
                evidence=evidence,
                of_data=of_data,
            )
        )

    def looked_again(self, step: int, *, because: str) -> None:
        """Note in the log of rank 0 that it was the data which made a step stand out.

        Args:
            step: its number; it has come out the same when other ranks computed it once more.
            because: how it stood out, in words.
        """
        if self.seat is not None and self.seat.rank == 0:
            print(  # noqa: T201 - the rank's log
                f"step {step}: {because}; {IT_IS_THE_DATA}",
                file=sys.stderr,
            )

    def threw_away(self, step: int, *, because: str) -> None:
        """Note in the log of rank 0 that a step is computed again, before it moved anything.

        Args:
            step: its number.
            because: what was wrong with it, in words; nobody can be named for that.
        """
        if self.seat is not None and self.seat.rank == 0:
            print(  # noqa: T201 - the rank's log
                f"step {step} {COMPUTED_AGAIN}: {because}", file=sys.stderr
            )

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Report that a rank held something else than most; one or two should tell.

        Args:
            step: that is begun anew for it, and has moved nothing.
            rank: who.
            source: whose state it was given, and holds now; itself, if it has computed it again.
            tensors: what it was given, by kind and name; none if the state was the same after all.
            seconds: since the step began.
        """
        told = self._repair(step, rank, source, tensors)
        self._send(msgspec.structs.replace(told, seconds=seconds))

    def repairing(self, step: int, *, rank: int, source: int, tensors: Sequence[str]) -> None:
        """Report that a rank is about to be given what others hold: it may die of that.

        Args:
            step: before which moved anything.
            rank: who.
            source: whose state it is given.
            tensors: what of it, by kind and name.
        """
        told = self._repair(step, rank, source, tensors)
        self._send(msgspec.structs.replace(told, begun=True))

    def not_repaired(self, step: int, *, because: str) -> None:
        """Report why state that differs stays so; what follows from that, digests say.

        Args:
            step: before which moved anything.
            because: why, in words.
        """
        self._send(Repaired(generation=self._generation, step=Step(step), problem=because))

    def detector_failed(self, detector: str, reason: str) -> None:
        """Report that this rank goes on without something that looks for wrong state.

        Args:
            detector: its name.
            reason: why, in words; usually what it raised.
        """
        self._send(DetectorOff(generation=self._generation, detector=detector, reason=reason))

    def _repair(self, step: int, rank: int, source: int, tensors: Sequence[str]) -> Repaired:
        return Repaired(
            generation=self._generation,
            step=Step(step),
            ranks=(Rank(rank),),
            source=Rank(source),
            tensors=tuple(tensors),
        )
