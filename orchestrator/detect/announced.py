"""How long ranks may stand still in a phase that they announced, as it was seen on this run.

To save and to evaluate takes about as long each time, so once that is known, standing still there
for far longer is a hang as anywhere else. What is announced and never alike has the limit of the
run file: compiling and tuning (from a cache or not), restoring, the end of a run. So has what was
not seen often enough, what a generation does for the first time, since its processes allocate for
it, and what a world of another size does.
"""

from __future__ import annotations

from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.detect.spells import Spells
from orchestrator.detect.stepping import Deadline
from orchestrator.protocol.phases import RankPhase

LEARNED = (RankPhase.CHECKPOINT, RankPhase.EVALUATING)
SPELLS_MIN = 5
"""A phase that was seen less often has the limit of the run file."""
FACTOR = 5.0
"""Times the p99.9 of what was seen, as for phases of a recovery (NVRx's learned timeouts)."""
FLOOR_S = 10.0
"""However short it always was: a disk or a network takes seconds now and then."""


class Announced:
    """The phases of one run in which standing still is announced."""

    def __init__(self) -> None:
        self._spells: dict[RankPhase, float] = {}
        """Of phases in which ranks are now, the longest that any of them has stood still."""
        self._known = Spells()
        self._begun: set[RankPhase] = set()
        """Which the present generation has been through."""

    def observe(self, state: RunState) -> None:
        """Take in where ranks are, at every look."""
        if self._known.begin_anew(state):
            self._begun, self._spells = set(), {}
        if state.phase is not RunPhase.TRAINING:
            return
        for phase in LEARNED:
            still_s = state.fleet.still_s(phase, state.now)
            if still_s is not None:
                self._spells[phase] = max(self._spells.get(phase, 0.0), still_s)
            elif phase in self._spells:
                self._learn(phase)

    def deadline(self, state: RunState, phase: RankPhase) -> Deadline:
        """Return how long a rank may stand still in an announced phase."""
        most_s = state.timeouts.warmup_s
        known = self._known.of(phase)
        if phase not in LEARNED:
            return Deadline(most_s, "default, it is never alike")
        if known is None or known.known < SPELLS_MIN:
            seen = known.known if known is not None else 0
            return Deadline(most_s, f"default, seen {seen} times, {SPELLS_MIN} are needed")
        if phase not in self._begun:
            return Deadline(most_s, "default, for the first time in this generation")
        usual_s = known.quantile(0.999)
        least_s = max(FLOOR_S, state.timeouts.hang_s + 2 * state.step_times.quantile(0.99))
        return Deadline(
            min(max(FACTOR * usual_s, least_s), most_s),
            f"learned: {FACTOR:g} x p99.9 {usual_s:.2f} s of {known.known} times, "
            f"within {least_s:.1f} and {most_s:g} s",
        )

    def broken_off(self) -> None:
        """Hear that a world is ended for standing still.

        What it took so far is learned: if it was only slow, it has more time the next time.
        """
        for phase in tuple(self._spells):
            self._learn(phase)

    def _learn(self, phase: RankPhase) -> None:
        self._known.learn(phase, self._spells.pop(phase))
        self._begun.add(phase)
