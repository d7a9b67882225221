"""Finds ranks that stand still, and tells the one that does from those that wait for it.

Four levels, each with its own limit: a process that the kernel shows as stopped; a world in
which nobody has moved for longer than two p99 steps plus `hang_s`; few ranks whose samples do not
come while all others wait for them, for ten seconds at least, longer than that and far longer than
it ever took there; a
phase of a recovery that takes far longer than it ever took in the same way. Announced phases
(compiling, restoring, saving) may stand still for as long as their own limit allows, which is
learned for those that are alike each time (announced.py).

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.core import patience
from orchestrator.core.events import Event, Telemetry, Tick
from orchestrator.core.facts import since_last_progress, world_mark
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.detect import waiting
from orchestrator.detect.announced import Announced
from orchestrator.protocol.ids import NodeId, Rank, Seconds
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import MARKS
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.ramp import uneven

LEARNED_FACTOR = 5.0
"""A phase of a recovery may take this many times its longest so far (NVRx's learned timeouts)."""
STARVED_FACTOR = 3.0
"""Others may wait this many times as long for samples of a node as they ever did. Assumed."""
STARVED_MIN_S = 10.0
"""For which samples are waited for at least, however soon ranks that stand still are to be found: a
source takes seconds now and then, and a restart would ask it once more."""
STEPS_KNOWN_MIN = 3
SPINNING_SHARE = 0.5
"""Of the time since it last moved, the part for which a rank used a processor."""
_RECOVERING = (
    RunPhase.STOPPING,
    RunPhase.STARTING,
    RunPhase.FORMING,
    RunPhase.RESTORING,
    RunPhase.WARMING,
)


class _Starving(NamedTuple):
    """Ranks whose samples do not come while all others wait for them; none if that is not so."""

    ranks: tuple[Rank, ...]
    nodes: tuple[NodeId, ...]
    """Where they are: by the time that it is over, they may be elsewhere."""
    since: Seconds
    """When any of the others moved last."""
    waited_s: float


_NOBODY = _Starving((), (), Seconds(0.0), 0.0)


class Hang:
    """Progress is what counts, not the time in a phase."""

    name = "hang"

    def __init__(self) -> None:
        self._announced = Announced()
        self._starving = _NOBODY
        self._starved_s: dict[NodeId, float] = {}
        """The longest for which others have waited for samples of each node, seconds."""

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return at most one finding: the ranks that hold up the rest."""
        if state.wanting or not state.seats or not isinstance(event, Telemetry | Tick):
            return []
        self._announced.observe(state)
        return (
            stopped(state)
            or standing_still(state, self._announced)
            or self._starved(state)
            or stuck_recovery(state)
            or broken(state)
        )

    def _starved(self, state: RunState) -> list[Finding]:
        """Find ranks that show signs of life, and whose samples do not come.

        How long a disk takes is learned for each node, also from a wait that was broken off: for a
        slow one a run is begun again a few times at most, and that of another node is no excuse.
        """
        limit_s = step_limit_s(state)
        now = starving(state)
        before, self._starving = self._starving, now
        if before.ranks and now.since != before.since:
            self._learn(before)
        if not now.ranks or limit_s is None:
            return []
        known_s = max(self._starved_s.get(node, 0.0) for node in now.nodes)
        limit_s = max(limit_s, STARVED_MIN_S, STARVED_FACTOR * known_s)
        if now.waited_s <= limit_s:
            return []
        self._learn(now)
        words = (
            f"samples do not come, and all others have waited in a collective for "
            f"{now.waited_s:.1f} s, limit {limit_s:.1f} s"
        )
        return [_finding(state, now.ranks, now.since, words)]

    def _learn(self, waited: _Starving) -> None:
        for node in waited.nodes:
            self._starved_s[node] = max(self._starved_s.get(node, 0.0), waited.waited_s)


def stopped(state: RunState) -> list[Finding]:
    """Find processes that the kernel shows as stopped (SIGSTOP, a debugger), in any phase."""
    if not state.now - state.fleet.stopped_since > state.timeouts.stopped_s:
        return []
    frozen_R = state.now - state.fleet.stopped_since_R > state.timeouts.stopped_s
    ranks = tuple(Rank(int(rank)) for rank in np.flatnonzero(frozen_R))
    since = Seconds(float(state.fleet.moved_at_R[list(ranks)].min()))
    words = f"process stopped (state T), no progress for {state.now - since:.1f} s"
    return [_finding(state, ranks, since, words)]


def standing_still(state: RunState, announced: Announced) -> list[Finding]:
    """Find the culprit when no rank of a training world has moved for too long."""
    fleet = state.fleet
    limit_s = step_limit_s(state)
    if state.phase is not RunPhase.TRAINING or limit_s is None:
        return []
    if state.now - fleet.last_moved_at <= limit_s:
        return []
    idle_R = state.now - fleet.moved_at_R
    # A rank that is done waits for the others; it is no reason for them to stand still.
    done_R = fleet.phase_R == RankPhase.DONE
    if bool(done_R.all()):
        return []
    patient_R = fleet.patient_R() & ~done_R
    # One rank that saves or compiles explains why all others wait for it.
    present = [RankPhase(int(phase)) for phase in np.unique(fleet.phase_R[patient_R])]
    limits_s = {phase: announced.limit_s(state, phase) for phase in present}
    for phase, most_s in limits_s.items():
        if bool((idle_R[fleet.phase_R == phase] <= most_s).any()):
            return []
    announced.broken_off()
    ranks = culprits(state, patient_R)
    since = Seconds(float(fleet.moved_at_R.max()))
    words = (
        f"no rank moved for {state.now - since:.1f} s, limit {limit_s:.1f} s "
        f"({state.timeouts.hang_s:g} s + 2 x p99 step {state.step_times.quantile(0.99):.2f} s)"
    ) + "".join(
        f", {phase.name.lower()} may take {most_s:.1f} s" for phase, most_s in limits_s.items()
    )
    return [_finding(state, ranks, since, words)]


def starving(state: RunState) -> _Starving:
    """Return which ranks wait for samples, if they are few and all others wait for them."""
    fleet = state.fleet
    # Asked at every tick: while all do the same, nobody waits for anybody.
    if state.phase is not RunPhase.TRAINING or fleet.alike:
        return _NOBODY
    reads_R = fleet.phase_R == RankPhase.DATA
    count = int(reads_R.sum())
    if not 0 < count <= len(reads_R) // 2:
        return _NOBODY  # a store that lets most of them wait is no rank's fault
    done_R = fleet.phase_R == RankPhase.DONE
    waits_R = ~reads_R & (fleet.entered_R > fleet.left_R) & ~fleet.patient_R()
    if not bool((reads_R | waits_R | done_R).all()) or not bool(waits_R.any()):
        return _NOBODY
    since = Seconds(float(fleet.moved_at_R[waits_R].max()))
    ranks = tuple(Rank(int(rank)) for rank in np.flatnonzero(reads_R))
    nodes = tuple(dict.fromkeys(state.seats[rank] for rank in ranks))
    return _Starving(ranks, nodes, since, state.now - since)


def step_limit_s(state: RunState) -> float | None:
    """Return how long a training world may stand still, seconds; None while nothing is learned."""
    if state.step_times.known < STEPS_KNOWN_MIN:
        return state.timeouts.warmup_s
    return state.timeouts.hang_s + 2 * state.step_times.quantile(0.99)


def culprits(state: RunState, overdue_R: npt.NDArray[np.bool_] | None = None) -> tuple[Rank, ...]:
    """Return the ranks that the others wait for; all of them empty-handed if none stands out.

    Ranks blocked in a collective sleep; one that burns its processor is not waiting. Failing
    that, who has not entered the collective that the others wait in; if all have, who is
    somewhere else than most, since it entered another one; and if nobody counts collectives, who is
    in a phase that it announced, or else behind the others.

    Args:
        state: of the run.
        overdue_R: ranks that have been in a phase that they announced for longer than it may take.
    """
    fleet = state.fleet
    world = len(fleet.phase_R)
    idle_R = np.maximum(state.now - fleet.moved_at_R, 1e-6)
    spinning_R = (fleet.cpu_s_R - fleet.cpu_at_move_s_R) / idle_R > SPINNING_SHARE
    spinning_R &= fleet.phase_R != RankPhase.DONE
    place_R = fleet.step_R * len(RankPhase) + fleet.phase_R
    behind_R = place_R == place_R.min()
    earliest_R = fleet.moved_at_R <= fleet.moved_at_R.min() + state.timeouts.beat_s
    longer_R = np.zeros(world, np.bool_) if overdue_R is None else overdue_R
    for suspect_R in (spinning_R, *_apart(state), longer_R, behind_R, earliest_R):
        count = int(suspect_R.sum())
        if 0 < count <= world // 2:
            return tuple(Rank(int(rank)) for rank in np.flatnonzero(suspect_R))
    return ()


def _apart(state: RunState) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield who never joined what others wait in, and who is where few are, as far as is known."""
    fleet = state.fleet
    # Who is done waits for the others in no collective.
    counts_R = (fleet.entered_R >= 0) & (fleet.phase_R != RankPhase.DONE)
    if not bool(counts_R.any()):
        return
    alike_R = stages(state.run.layout, len(counts_R))
    one_stage = not alike_R.any()
    if uneven(state.run, state.replicas):
        # A replica that computes more enters more of them for good: its ranks tell of each other.
        alike_R = alike_R * state.replicas + replicas(state.run.layout, len(counts_R))
    member_GR = (alike_R == np.unique(alike_R)[:, None]) & counts_R
    entered_GR, left_GR = (
        np.broadcast_to(column_R, member_GR.shape) for column_R in (fleet.entered_R, fleet.left_R)
    )
    yield _mask(waiting.culprits(entered_GR, left_GR, member_GR), len(counts_R))
    if one_stage:
        # Several stages of a pipeline are never at the same place.
        yield _mask(waiting.minority(fleet.step_R * len(RankPhase) + fleet.phase_R), len(counts_R))


def _mask(ranks: npt.NDArray[np.int64], world: int) -> npt.NDArray[np.bool_]:
    mask_R = np.zeros(world, np.bool_)
    mask_R[ranks] = True
    return mask_R


@lru_cache(maxsize=4)
def stages(layout: Layout, world: int) -> npt.NDArray[np.int64]:
    """Return the stage of the pipeline of each rank, shape [R]: those of one take equal steps."""
    return np.array([layout.position(rank).pp for rank in range(world)], np.int64)


@lru_cache(maxsize=4)
def replicas(layout: Layout, world: int) -> npt.NDArray[np.int64]:
    """Return the replica of each rank, shape [R]: its ranks always take equal shares."""
    return np.array([layout.replica_of(rank) for rank in range(world)], np.int64)


def stuck_recovery(state: RunState) -> list[Finding]:
    """Find what holds up a recovery that takes far longer than any before it."""
    if state.phase not in _RECOVERING:
        return []
    limit_s = recovery_limit_s(state)
    spent_s = state.now - state.phase_since
    if spent_s <= limit_s:
        return []
    mark = world_mark(state)
    slow = tuple(n for n in state.world if state.nodes[n].mark <= mark)
    everyone = len(slow) == len(state.seated)
    ranks = () if everyone else tuple(r for n in slow for r in state.ranks_of(NodeId(n)))
    words = (
        f"{state.phase} for {spent_s:.1f} s, limit {limit_s:.1f} s; "
        f"{'every node' if everyone else ', '.join(slow)} only {MARKS[mark]}"
    )
    return [_finding(state, ranks, state.phase_since, words)]


def recovery_limit_s(state: RunState) -> float:
    """Return how long the present phase of a recovery may take, seconds.

    What was never seen in this way is announced by its ranks, and has the time of what is.
    """
    t = state.timeouts
    if state.phase is RunPhase.STOPPING:
        return t.abort_s + t.terminate_s + t.kill_s + t.form_s
    longest_s = patience.longest_s(state)
    if longest_s is None:
        return t.warmup_s
    return min(max(LEARNED_FACTOR * longest_s, t.form_s), t.warmup_s)


def broken(state: RunState) -> list[Finding]:
    """Find a world whose collectives failed although nobody died: a network that lost them."""
    if not state.troubled:
        return []
    since = Seconds(min(at for at, _ in state.troubled.values()))
    # Longer than silence: whoever died or vanished is found first, and is the better explanation.
    if state.now - since <= state.timeouts.silence_s + 2 * state.timeouts.beat_s:
        return []
    node, (_, message) = min(state.troubled.items(), key=lambda item: (item[1][0], item[0]))
    return [
        Finding(
            at=state.now,
            since=since,
            kind="broken-collective",
            cause=Cause.NETWORK,
            step=state.reached_step,
            evidence=f"collectives failed, first on {node}, and nobody died: {message[:200]}",
            around=_around(state),
        )
    ]


def _around(state: RunState) -> tuple[NodeId, ...]:
    """Return who is behind the others, or else who said first that collectives fail, in order.

    Nobody, if that is most of them.
    """
    behind = dict.fromkeys(state.seats[rank] for rank in culprits(state))
    first = min(at for at, _ in state.troubled.values()) + state.timeouts.beat_s
    said = sorted((at, node) for node, (at, _) in state.troubled.items() if at <= first)
    nodes = tuple(behind) or tuple(node for _, node in said if node in state.seated)
    return nodes if len(nodes) <= len(state.seated) // 2 else ()


def _collective(state: RunState, rank: Rank) -> str:
    """Say how many collectives a rank has entered and left, and in which others wait."""
    entered, left = int(state.fleet.entered_R[rank]), int(state.fleet.left_R[rank])
    if entered < 0:
        return ""
    there = f"waits in collective {entered}" if entered > left else f"is in none after {left}"
    waits_R = state.fleet.entered_R > state.fleet.left_R
    most = int(state.fleet.entered_R[waits_R].max(initial=-1))
    return f", {there}" + (f", others wait in {most}" if most > entered else "")


def _finding(state: RunState, ranks: tuple[Rank, ...], since: Seconds, words: str) -> Finding:
    fleet = state.fleet
    places = [
        f"rank {rank} on {state.seats[rank]}: {RankPhase(int(fleet.phase_R[rank])).name.lower()} "
        f"after step {fleet.step_of(rank)}, state {fleet.state_of(rank)}{_collective(state, rank)}"
        for rank in ranks[:8]
    ]
    who = "; ".join(places) if places else "no rank stands out"
    return Finding(
        at=state.now,
        since=min(since, state.now),
        kind="hang",
        cause=Cause.UNKNOWN,
        ranks=ranks,
        nodes=tuple(sorted({state.seats[rank] for rank in ranks})),
        step=state.reached_step,
        evidence=f"{words}; {who}",
        detail=f"last progress of the world at {since_last_progress(state):.2f} s",
    )
