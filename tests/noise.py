"""A run whose steps take as long as they do in life: parts of a step, waits, saves, surprises.

Nothing of it is real but the controller: telemetry of every beat says what ranks that take such
times would say.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from orchestrator.core.events import Telemetry
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import StepReport
from orchestrator.protocol.phases import RankPhase
from tests import runfiles
from tests.conftest import Cluster
from tests.meshes import Mesh, Run

MESH = Mesh(Layout(dp_shard=2, tp=2))
KINDS = ("tp", "dp_shard")
PROGRAMS = [MESH.schedule(rank, KINDS, 2) for rank in range(MESH.size)]
PARTS = {
    RankPhase.DATA: 0.02,
    RankPhase.FORWARD: 0.3,
    RankPhase.BACKWARD: 0.6,
    RankPhase.OPTIMIZER: 0.08,
}
"""Of a step."""
STALL_S = 5.0
MARGIN = 10.0
"""Seconds within which a hang is to be noticed, besides three steps."""


class Part(NamedTuple):
    """Ranks do something, and then wait until all are done with it."""

    phase: RankPhase
    took_s: np.ndarray
    """By each rank, until it waits for the others."""
    step: int = 0
    """The step that is complete then; 0 for none."""
    unseen_s: float = 0.0
    """For how long nobody looked before."""


class Noise:
    """Draws how long things take.

    Args:
        step_s: seconds of a usual step.
        rng: what it draws from.
    """

    def __init__(self, step_s: float, rng: np.random.Generator) -> None:
        self._step_s, self._rng = step_s, rng

    def step(self, step: int) -> Iterator[Part]:
        """Yield the parts of a step, and what is done between it and the next."""
        rng = self._rng
        # Now and then a disk, a collector or a neighbour holds one rank up, for seconds at most.
        whole_s = self._step_s * rng.lognormal(0.0, 0.1)
        for phase, share in PARTS.items():
            took_s = whole_s * share * rng.lognormal(0.0, 0.1, MESH.size)
            if rng.random() < 0.005:
                took_s[rng.integers(MESH.size)] += min(0.5 * rng.pareto(1.2), STALL_S)
            yield Part(phase, took_s, step if phase is RankPhase.OPTIMIZER else 0)
        if step % 25 == 0:
            yield self._apart(RankPhase.CHECKPOINT, 1.0)
        if step % 100 == 0:
            yield self._apart(RankPhase.EVALUATING, 10.0)
        if step % 400 == 0:  # other shapes: it is compiled anew
            yield self._apart(RankPhase.WARMING, 60.0)
        if rng.random() < 1 / 500:  # somebody shut the laptop
            asleep_s = rng.uniform(20.0, 40_000.0)
            yield Part(RankPhase.FORWARD, np.full(MESH.size, 0.1), unseen_s=asleep_s)

    def _apart(self, phase: RankPhase, usual_s: float) -> Part:
        took_s = usual_s * self._rng.lognormal(0.0, 0.3)
        return Part(phase, took_s * self._rng.lognormal(0.0, 0.1, MESH.size))


class Found(NamedTuple):
    """What became of one rank that stopped."""

    waited_s: float
    within_s: float
    """Three steps and the margin."""
    exact: bool


class Trial:
    """A cluster that lives through such a run.

    Attributes:
        false_kills: worlds that were ended although nobody had stopped.
        steps: that were taken.
    """

    def __init__(self, step_s: float, seed: int) -> None:
        text = runfiles.text(
            trainer={"steps": 1_000_000},
            parallelism={"dpReplicate": 1, "dpShard": 2, "tp": 2},
            recovery={"hardwareBudget": 1_000_000, "softwareBudget": 1_000_000},
        )
        self.cluster = Cluster(text)
        self.cluster.start()
        self._rng = np.random.default_rng(seed)
        self._step_s, self._noise = step_s, Noise(step_s, self._rng)
        self._due = self.cluster.now
        self._moves = np.zeros(MESH.size, np.int64)
        self._counts = np.zeros(MESH.size, np.int64)
        self._reports: tuple[StepReport, ...] = ()
        self._at_step_s = self.cluster.now
        self.false_kills, self.steps = 0, 0

    def train(self, steps: int) -> None:
        """Take so many steps, of which none hangs."""
        for _ in range(steps):
            self.steps += 1
            for part in self._noise.step(self.steps):
                self._go_through(part)

    def hang(self) -> Found:
        """Have one rank stop somewhere; return what becomes of that."""
        rank = int(self._rng.integers(MESH.size))
        place = int(self._rng.integers(len(PROGRAMS[rank])))
        told = Run(MESH, PROGRAMS, {rank: place}).told()
        phases = list(PARTS)
        places = [phases[int(self._rng.integers(len(phases)))]] * MESH.size
        cluster, begun = self.cluster, self.cluster.now
        known = len(cluster.state.incidents)
        self._moves += 1
        while len(cluster.state.incidents) == known:
            cluster.after(cluster.state.timeouts.beat_s)
            cluster.beat(
                step=cluster.state.reached_step, moving=lambda _: False, groups=told,
                phases=dict(enumerate(places)),
            )  # fmt: skip
        (found,) = cluster.state.incidents[-1].findings
        waited_s = cluster.now - begun
        self._recover()
        return Found(waited_s, 3 * self._step_s + MARGIN, exact=found.ranks == (rank,))

    def _recover(self) -> None:
        if self.cluster.state.phase is RunPhase.BACKING_OFF:
            self.cluster.rest()
        self.cluster.resume()
        self.cluster.hold(self.cluster.state.reached_step)
        self._due = self._at_step_s = self.cluster.now
        self._reports = ()
        # A process starts to count anew.
        self._moves[:], self._counts[:] = self.cluster.progress + 1_000_000, 0

    def _go_through(self, part: Part) -> None:
        """Have all ranks do a part, and beats be heard meanwhile."""
        cluster = self.cluster
        begun = cluster.now + part.unseen_s
        self._at_step_s += part.unseen_s  # the clock of a process does not go on meanwhile
        self._due = max(self._due, begun)
        end = begun + float(part.took_s.max())
        beat_s = cluster.state.timeouts.beat_s
        self._moves += 1
        while self._due <= end:
            cluster.now = round(self._due, 6)
            self._beat(part, waits=part.took_s < self._due - begun)
            self._due += beat_s
        cluster.now = end
        self._moves += 2  # who waited has entered a collective, and has left it
        self._counts += 1
        if part.step:
            step = Step(cluster.state.reached_step + len(self._reports) + 1)
            seconds = end - self._at_step_s
            self._reports += (StepReport(step, 2.0, 1.0, 100, seconds),)
        if part.step or part.phase not in PARTS:
            self._at_step_s = end

    def _beat(self, part: Part, waits: np.ndarray) -> None:
        cluster = self.cluster
        reached = cluster.state.reached_step + len(self._reports)
        known = len(cluster.state.incidents)
        cluster.tell(
            Telemetry(
                at=cluster.at(), generation=cluster.state.generation,
                heard=tuple(sorted(cluster.state.nodes)), phases=(int(part.phase),),
                steps=(reached,), progress=tuple((self._moves + waits).tolist()),
                states="S", cpu_s=(0.0,), stall_s=0.0, reports=self._reports,
                entered=tuple((self._counts + waits).tolist()),
                left=tuple(self._counts.tolist()),
            )
        )  # fmt: skip
        self._reports = ()
        if len(cluster.state.incidents) > known:
            self.false_kills += 1
            self._recover()
