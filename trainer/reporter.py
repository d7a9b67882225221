"""Who hears how training goes."""

from collections.abc import Sequence
from typing import Any, Protocol

from orchestrator.protocol.digests import Kind, Taken
from orchestrator.protocol.groups import ALL
from orchestrator.worker import RankPhase


class Reporter(Protocol):
    """Who hears how training goes; `orchestrator.worker.Worker` does."""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Hear what the rank does from now on."""

    def entered_collective(self, group: str | None = ALL, what: str = "") -> None:
        """Count a collective of a group that this rank waits in from now on, and what it is."""

    def left_collective(self, group: str | None = ALL) -> None:
        """Count a collective that is over."""

    def digested(self, taken: Taken, digests: dict[Kind, int]) -> None:
        """Hear what the state was before a step moved the weights."""

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
        """Hear that some ranks compute wrongly, or may do."""

    def looked_again(self, step: int, *, because: str) -> None:
        """Hear that a step stood out, and came out the same when it was computed once more."""

    def threw_away(self, step: int, *, because: str) -> None:
        """Hear that a step is computed again, and that nobody can be named for it."""

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Hear that a rank's state was wrong, and now is that of another one."""

    def repairing(self, step: int, *, rank: int, source: int, tensors: Sequence[str]) -> None:
        """Hear that a rank's state was wrong, and is about to be given that of another one."""

    def not_repaired(self, step: int, *, because: str) -> None:
        """Hear that state differs, and why it stays so."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""

    def step_done(  # noqa: PLR0913 - what there is to tell of a step
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        compute_s: float | None = None,
        busy_s: float = 0.0,
        work: float = 0.0,
    ) -> None:
        """Hear that a step is complete."""


class Unheard:
    """A reporter that tells nobody."""

    def _ignore(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - whatever it is
        """Ignore it."""

    phase = entered_collective = left_collective = _ignore
    digested = diverged = looked_again = threw_away = detector_failed = _ignore
    repaired = repairing = not_repaired = _ignore
    step_done = _ignore
