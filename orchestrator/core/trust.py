"""Which states can be trusted: those that no silent corruption is known to have come before.

A state is named by its step and the generation that made it. What a run goes back behind stays
where it is, for whoever looks into it, and is never restored again: neither from memory nor from
the durable tier, by this life of the run or by a later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from orchestrator.protocol.ids import Generation, Step


class Verdict(StrEnum):
    """What can be found about a checkpoint that exists; as the store has it (storage.verdicts)."""

    BYTES_VERIFIED = "bytes-verified"
    STATE_VERIFIED = "state-verified"
    COMPUTE_VERIFIED = "compute-verified"
    SUSPECT = "suspect"
    """It is not to be resumed from."""

    @property
    def good(self) -> bool:
        """Whether it raises the trust in a checkpoint."""
        return self is not Verdict.SUSPECT


class Onset(msgspec.Struct, frozen=True, array_like=True):
    """Silent corruption began, as far as is known, after `step`: the last state that is good.

    It says so of the states that `generation` and those before it made.
    """

    step: Step
    generation: Generation


def trusted(onsets: Iterable[Onset], step: Step, epoch: Generation) -> bool:
    """Whether no onset is known to lie before the state that a generation made after `step`."""
    return not any(step > onset.step and epoch <= onset.generation for onset in onsets)


def why_not(onsets: Iterable[Onset], step: Step, epoch: Generation) -> str:
    """Say why a state is not trusted; "" if it is."""
    good = [onset.step for onset in onsets if not trusted((onset,), step, epoch)]
    if not good:
        return ""
    last = f"step {min(good)}" if min(good) > 0 else "the seed"
    return f"made after a silent corruption: nothing after {last} is trusted"
