"""How long ranks may stand still within a step, by what they do there, as it was seen on this run.

A step is over when the slowest part of it is, so what a whole step takes is a bound for each part,
and a poor one for most. Once it was seen often enough for how long ranks stand still in a phase,
that is the bound; it is never longer than that of steps, and never less than one of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.detect.spells import Spells
from orchestrator.protocol.phases import RankPhase

PHASES = (RankPhase.DATA, RankPhase.FORWARD, RankPhase.BACKWARD, RankPhase.OPTIMIZER)
"""Of a step. To wait for others in a collective is part of each of them."""
SPELLS_MIN = 50
"""A phase in which ranks were seen to stand still less often is bounded by what steps take."""
FACTOR = 5.0
"""Times the p99.9 of what was seen (NVRx's learned timeouts)."""
STEPS_KNOWN_MIN = 3
QUANTILE = 0.99


class Deadline(NamedTuple):
    """How long may pass, and why so long."""

    seconds: float
    origin: str

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s ({self.origin})"


class Stepping:
    """What one run was seen to do in its steps."""

    def __init__(self) -> None:
        self._known = Spells()
        self._still: dict[RankPhase, float] = {}
        """The longest that any rank had stood still in a phase, at the last look."""

    def observe(self, state: RunState) -> None:
        """Take in where ranks are, at every look."""
        if self._known.begin_anew(state):
            self._still = {}
        if state.phase is not RunPhase.TRAINING:
            return
        for phase in PHASES:
            still_s = state.fleet.still_s(phase, state.now)
            before_s = self._still.get(phase)
            if before_s is not None and (still_s is None or still_s < before_s):
                self._learn(phase)
            if still_s is not None:
                self._still[phase] = still_s

    def deadline(self, state: RunState, phases: Collection[RankPhase]) -> Deadline:
        """Return how long a training world may stand still while ranks are in these phases."""
        known = [self._known.of(phase) for phase in phases]
        seen = [each for each in known if each is not None and each.known >= SPELLS_MIN]
        whole = of_steps(state)
        if not seen or len(seen) < len(known) or state.step_times.known < STEPS_KNOWN_MIN:
            return whole
        hang_s, step_s = state.timeouts.hang_s, state.step_times.quantile(QUANTILE)
        longest_s = max(each.quantile(0.999) for each in seen)
        span_s = max(FACTOR * longest_s, step_s)
        if span_s >= 2 * step_s:
            return whole
        names = ", ".join(sorted(phase.name.lower() for phase in phases))
        looks = min(each.known for each in seen)
        return Deadline(
            hang_s + span_s,
            f"{hang_s:g} s + {span_s:.2f} s, learned: {names} stood still for {longest_s:.2f} s "
            f"at most (p99.9 of {looks} times), p99 step {step_s:.2f} s",
        )

    def broken_off(self) -> None:
        """Hear that a world is ended for standing still: if it was only slow, it is known now."""
        for phase in tuple(self._still):
            self._learn(phase)

    def _learn(self, phase: RankPhase) -> None:
        self._known.learn(phase, self._still.pop(phase))


def of_steps(state: RunState) -> Deadline:
    """Return how long a training world may stand still by what whole steps take."""
    steps, hang_s = state.step_times, state.timeouts.hang_s
    if steps.known < STEPS_KNOWN_MIN:
        return Deadline(
            state.timeouts.warmup_s, f"default, {steps.known} steps of this run are known"
        )
    step_s = steps.quantile(QUANTILE)
    return Deadline(
        hang_s + 2 * step_s,
        f"{hang_s:g} s + 2 x p99 step {step_s:.2f} s, learned from {steps.known} steps",
    )
