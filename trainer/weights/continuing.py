"""Goes on from the state of another run: weights, what the optimizer remembers, and place in data.

A checkpoint's shards say where each piece lies in the whole, so whoever is cut otherwise reads the
boxes that are its own. A run's own checkpoints are restored shard by shard (trainer.checkpoint),
which needs no other shard and works from memory, or if they are of another cut as well by boxes
(trainer.restoring).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from orchestrator.worker import MisconfiguredError
from trainer.config import ModelConfig
from trainer.optim import STATES, ShardState
from trainer.stamp import Cursor, require_same_data
from trainer.weights import run
from trainer.weights.stored import Weights


class Continued(NamedTuple):
    """A checkpoint of another run."""

    step: int
    """Steps that lie behind it."""
    cursor: dict[str, object]
    """Where its run stood in its data, as `Cursor` in builtins."""
    digest: str
    """Of the manifest."""
    where: str
    states: dict[str, Weights]
    """By `STATES`."""

    def require(self, config: ModelConfig, steps: int) -> None:
        """Refuse it for a model of other sizes, or for a run that would have no step left.

        Raises:
            MisconfiguredError: naming what differs.
        """
        self.states["param"].require(config)
        if self.step >= steps:
            raise MisconfiguredError(
                f"the checkpoint has {self.step} steps behind it, expected fewer than "
                f"spec.trainer.steps = {steps}: {self.where}",
                hint="spec.trainer.steps counts those that were taken by the other run as well",
            )

    def fill(self, shards: Sequence[ShardState], start: Cursor, check: Callable[[], None]) -> int:
        """Fill this rank's state, reading nothing else of it; return the steps behind it.

        Args:
            shards: what to fill.
            start: of a run of this job that has not begun: it has to come to the same place.
            check: called before each tensor; may raise.

        Raises:
            MisconfiguredError: if the data is another, or a byte is not what was written.
        """
        require_same_data(start.after(self.step), self.cursor, self.where)
        for state in STATES:
            parts = [(s.name, s.weight, getattr(s, state)) for s in shards]
            self.states[state].fill(parts, check)
        return self.step


def open_state(address: str) -> Continued:
    """Open a checkpoint of another run.

    Args:
        address: folder of the run, with `@STEP` for that checkpoint and not the newest.

    Raises:
        MisconfiguredError: if there is no such run or checkpoint, or it is not of this trainer.
    """
    if (at := run.find(address)) is None:
        raise MisconfiguredError(
            f"no folder of a run: {address}",
            hint="`holdfast get runs -o wide` has them; for weights alone there is initFrom",
        )
    manifest, cursor, states = run.open_states(at, STATES)
    where = f"step {manifest.step} of {at.folder}"
    return Continued(manifest.step, cursor, manifest.root, where, states)
