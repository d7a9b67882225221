"""The fleet as columns: what is known of every rank of the current world, one array per fact.

16,384 ranks are a few hundred kilobytes here and one vector operation per tick; an object per
rank and heartbeat would be billions over a run. Letters in array names: R ranks of the world.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import numpy.typing as npt

from orchestrator.protocol.ids import Rank, Seconds, Step
from orchestrator.protocol.phases import RankPhase

_PATIENT = np.array([phase.patient for phase in RankPhase])


class Fleet:
    """What telemetry has said about the ranks of one generation."""

    def __init__(self, world_size: int, at: Seconds) -> None:
        self.phase_R = np.zeros(world_size, np.int64)
        self.step_R = np.full(world_size, -1, np.int64)
        self.progress_R = np.full(world_size, -1, np.int64)
        self.cpu_s_R = np.zeros(world_size)
        self.cpu_at_move_s_R = np.zeros(world_size)
        """Processor seconds when the rank last moved: the difference says who is spinning."""
        self.moved_at_R = np.full(world_size, at)
        self.stopped_since_R = np.full(world_size, np.inf)
        """Since when the kernel has shown the process as stopped; inf if it does not."""
        self._letter_R = np.full(world_size, ord("?"), np.uint8)

    def observe(
        self,
        at: Seconds,
        *,
        phases: tuple[int, ...],
        steps: tuple[int, ...],
        progress: tuple[int, ...],
        states: str,
        cpu_s: tuple[float, ...],
    ) -> None:
        """Take in one tick of columns over all ranks; -1 and "?" leave a rank as it was.

        A column of length one says the same of every rank.
        """
        columns = (phases, steps, progress, states, cpu_s)
        if progress[0] >= 0 and all(len(column) == 1 for column in columns):
            self._observe_alike(at, phases[0], steps[0], progress[0], states, cpu_s[0])
            return
        progress_R = np.asarray(progress, np.int64)
        known_R = progress_R >= 0
        moved_R = known_R & (progress_R != self.progress_R)
        cpu_R = np.asarray(cpu_s, np.float64)
        self.phase_R = np.where(known_R, np.asarray(phases, np.int64), self.phase_R)
        self.step_R = np.where(known_R, np.asarray(steps, np.int64), self.step_R)
        self.progress_R = np.where(known_R, progress_R, self.progress_R)
        self.cpu_s_R = np.where(known_R, cpu_R, self.cpu_s_R)
        self.moved_at_R = np.where(moved_R, at, self.moved_at_R)
        self.cpu_at_move_s_R = np.where(moved_R, cpu_R, self.cpu_at_move_s_R)
        # Not every tick hears of every rank: what is unknown is as it was.
        letter_R = np.frombuffer(states.encode("ascii", "replace"), np.uint8)
        self._letter_R = np.where(known_R, letter_R, self._letter_R)
        stopped_R = ((self._letter_R == ord("T")) | (self._letter_R == ord("t"))) & ~moved_R
        since_R = np.minimum(self.stopped_since_R, at)
        self.stopped_since_R = np.where(stopped_R, since_R, np.inf)

    def _observe_alike(
        self, at: Seconds, phase: int, step: int, progress: int, state: str, cpu_s: float
    ) -> None:
        """Take in one tick in which every rank does the same: nearly every one."""
        moved_R = self.progress_R != progress
        self.phase_R[:], self.step_R[:], self.progress_R[:] = phase, step, progress
        self.cpu_s_R[:], self._letter_R[:] = cpu_s, ord(state)
        self.moved_at_R[moved_R] = at
        self.cpu_at_move_s_R[moved_R] = cpu_s
        if state in "Tt":
            self.stopped_since_R = np.where(moved_R, np.inf, np.minimum(self.stopped_since_R, at))
        else:
            self.stopped_since_R[:] = np.inf

    @property
    def states(self) -> str:
        """Return the kernel's process state of each rank, one letter each, "?" where unknown."""
        return self._letter_R.tobytes().decode("ascii")

    def state_of(self, rank: Rank) -> str:
        """Return the kernel's process state of a rank."""
        return chr(self._letter_R[rank])

    def forgive(self, at: Seconds) -> None:
        """Count standing still from `at` on: until then nobody was looking."""
        self.moved_at_R = np.maximum(self.moved_at_R, at)
        self.stopped_since_R = np.where(np.isinf(self.stopped_since_R), np.inf, at)

    def patient_R(self) -> npt.NDArray[np.bool_]:
        """Return which ranks announced a phase in which standing still is no hang."""
        return _PATIENT[np.clip(self.phase_R, 0, len(_PATIENT) - 1)]

    def step_of(self, rank: Rank) -> Step:
        """Return the steps that a rank has completed; 0 if it never said."""
        return Step(max(int(self.step_R[rank]), 0))


class StepTimes:
    """Step times as they are learned; the basis of every limit on standing still."""

    def __init__(self, window: int = 512) -> None:
        self._recent: deque[float] = deque(maxlen=window)

    def learn(self, seconds: float) -> None:
        """Take in the duration of one healthy step."""
        self._recent.append(seconds)

    @property
    def known(self) -> int:
        """How many steps the estimate rests on."""
        return len(self._recent)

    def quantile(self, q: float) -> float:
        """Return the q-quantile in seconds; 0 before the first step.

        With fewer than 100 steps the largest stands in for high quantiles.
        """
        if not self._recent:
            return 0.0
        # Asked for at every tick: for a few hundred numbers this beats numpy's by far.
        ordered = sorted(self._recent)
        return ordered[math.ceil(q * (len(ordered) - 1))]
