"""Finds ranks that stand still, and tells the one that does from those that wait for it.

Four levels, each with its own limit: a process that the kernel shows as stopped; a world in
which nobody has moved for longer than `hang_s` plus two p99 steps, or less, as ranks are known to
do in the phase of a step that they are in (stepping.py); few ranks whose samples do not come while
all others wait for them, for so long that it is known ten seconds after they are missing, and far
longer than it ever took there; a phase of a recovery that takes far longer than it ever took in the
same way. Announced phases (compiling, restoring, saving) may stand still for as long as their own
limit allows, which is learned for those that are alike each time (announced.py).

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.core import patience
from orchestrator.core.events import Event, Telemetry, Tick
from orchestrator.core.facts import since_last_progress
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.marks import world_mark
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.detect.announced import Announced
from orchestrator.detect.awaited import collective, culprits
from orchestrator.detect.stepping import PHASES, STEPS_KNOWN_MIN, Deadline, Stepping, of_steps
from orchestrator.protocol.ids import NodeId, Rank, Seconds
from orchestrator.protocol.messages import MARKS
from orchestrator.protocol.phases import RankPhase

LEARNED_FACTOR = 5.0
"""A phase of a recovery may take this many times its longest so far (NVRx's learned timeouts)."""
AGAIN_FACTOR = 2.0
"""What was broken off may take so many times as long when it is tried again, until it came to its
end once."""
AGAIN_WARMUPS, AGAIN_MAX_S = 8.0, 3600.0
"""But no longer than so many times what its operator allows anything to stand still for
(`warmup_s`), nor than an hour: what is no slower than that comes to its end in the fourth try, and
what hangs is not waited for ever longer. An hour is assumed."""
STARVED_FACTOR = 3.0
"""Others may wait this many times as long for samples of a node as they ever did, up to what its
operator lets anything stand still for (`warmup_s`): where they never come, each restart would wait
longer for them than the one before. Assumed."""
STARVED_WITHIN_S = 10.0
"""Within which it is to be known that samples do not come, from when they are missing on, however
much sooner ranks that stand still are to be found: a source takes seconds now and then, and a
restart would ask it once more. What is left of that is how long others wait."""
STARVED_LOOKS = 3
"""Beats of it that pass unseen: until an agent has told that nobody goes on, until that is looked
at, and from when it has been so for too long to the next look."""
STARVED_APART_S = 1.0
"""Seconds of it that are not part of one wait. Half is for the end of the step before: that waits
for samples which are read twice (`trainer/readings.py`), and then goes on without. The other half
is for a machine that is busy."""
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
    silent_s: float
    """For how long one of them has shown no sign of life."""


_NOBODY = _Starving((), (), Seconds(0.0), 0.0, 0.0)


class Hang:
    """Progress is what counts, not the time in a phase."""

    name = "hang"

    def __init__(self) -> None:
        self._announced, self._stepping = Announced(), Stepping()
        self._starving = _NOBODY
        self._starved_s: dict[NodeId, float] = {}
        """The longest for which others have waited for samples of each node, seconds."""

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return at most one finding: the ranks that hold up the rest."""
        if state.wanting or not state.seats or not isinstance(event, Telemetry | Tick):
            return []
        self._announced.observe(state)
        self._stepping.observe(state)
        return (
            stopped(state)
            or standing_still(state, self._announced, self._stepping)
            or self._starved(state)
            or stuck_recovery(state)
            or broken(state)
        )

    def _starved(self, state: RunState) -> list[Finding]:
        """Find ranks that show signs of life, and whose samples do not come.

        How long a disk takes is learned for each node, also from a wait that was broken off: for a
        slow one a run is begun again a few times at most, and that of another node is no excuse.
        """
        now = starving(state)
        before, self._starving = self._starving, now
        if before.ranks and now.since != before.since:
            self._learn(before)
        if not now.ranks:
            return []
        known_s = max(self._starved_s.get(node, 0.0) for node in now.nodes)
        limit = max(_starved_by_default(state, now), _starved_again(state, known_s))
        if now.waited_s <= limit.seconds:
            return []
        self._learn(now)
        words = (
            f"samples do not come, and all others have waited in a collective for "
            f"{now.waited_s:.1f} s, limit {limit}"
        )
        return [_finding(state, now.ranks, now.since, words)]

    def _learn(self, waited: _Starving) -> None:
        for node in waited.nodes:
            self._starved_s[node] = max(self._starved_s.get(node, 0.0), waited.waited_s)


def _starved_by_default(state: RunState, starving: _Starving) -> Deadline:
    """Return how long others may wait for samples, whatever was seen of those who have none.

    However long steps take, which says nothing of a source. But a rank that shows no sign of life
    may compute, for as long as a step does; and before the first steps nobody knows what is usual.
    """
    t = state.timeouts
    unseen_s = STARVED_LOOKS * t.beat_s
    least = Deadline(
        max(STARVED_WITHIN_S - STARVED_APART_S - unseen_s, t.hang_s),
        f"default, to be known within {max(STARVED_WITHIN_S, t.detect_within_s):g} s",
    )
    computes = starving.silent_s > unseen_s or state.step_times.known < STEPS_KNOWN_MIN
    return max(least, of_steps(state)) if computes else least


def _starved_again(state: RunState, known_s: float) -> Deadline:
    """Return how long others may wait for samples of nodes that they waited for before."""
    again_s, most_s = STARVED_FACTOR * known_s, state.timeouts.warmup_s
    words = f"learned: {STARVED_FACTOR:g} x {known_s:.2f} s that others waited for it before"
    if again_s > most_s:
        words += f", and no more than warmup_s, {most_s:g} s"
    return Deadline(min(again_s, most_s), words)


def stopped(state: RunState) -> list[Finding]:
    """Find processes that the kernel shows as stopped (SIGSTOP, a debugger), in any phase."""
    if not state.now - state.fleet.stopped_since > state.timeouts.stopped_s:
        return []
    frozen_R = state.now - state.fleet.stopped_since_R > state.timeouts.stopped_s
    ranks = tuple(Rank(int(rank)) for rank in np.flatnonzero(frozen_R))
    since = Seconds(float(state.fleet.moved_at_R[list(ranks)].min()))
    words = f"process stopped (state T), no progress for {state.now - since:.1f} s"
    return [_finding(state, ranks, since, words)]


def standing_still(state: RunState, announced: Announced, stepping: Stepping) -> list[Finding]:
    """Find the culprit when no rank of a training world has moved for too long."""
    fleet = state.fleet
    still_s = state.now - fleet.last_moved_at
    # Asked at every tick: what ranks do is looked up only where it may matter.
    if state.phase is not RunPhase.TRAINING or still_s <= state.timeouts.hang_s:
        return []
    limit = stepping.deadline(state, _busy(state))
    if still_s <= limit.seconds:
        return []
    idle_R = state.now - fleet.moved_at_R
    # A rank that is done waits for the others; it is no reason for them to stand still.
    done_R = fleet.phase_R == RankPhase.DONE
    if bool(done_R.all()):
        return []
    patient_R = fleet.patient_R() & ~done_R
    # One rank that saves or compiles explains why all others wait for it.
    present = [RankPhase(int(phase)) for phase in np.unique(fleet.phase_R[patient_R])]
    limits = {phase: announced.deadline(state, phase) for phase in present}
    for phase, most in limits.items():
        if bool((idle_R[fleet.phase_R == phase] <= most.seconds).any()):
            return []
    announced.broken_off()
    stepping.broken_off()
    ranks = culprits(state, patient_R)
    since = Seconds(float(fleet.moved_at_R.max()))
    words = f"no rank moved for {state.now - since:.1f} s, limit {limit}" + "".join(
        f", {phase.name.lower()} may take {most}" for phase, most in limits.items()
    )
    return [_finding(state, ranks, since, words)]


def _busy(state: RunState) -> list[RankPhase]:
    """Return the phases of a step in which ranks are that wait for nobody; of all if all wait."""
    fleet = state.fleet
    waits_R = fleet.entered_R > fleet.left_R
    busy_R = ~waits_R if not bool(waits_R.all()) else waits_R
    return [phase for phase in PHASES if bool((fleet.phase_R[busy_R] == phase).any())]


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
    silent_s = state.now - float(fleet.moved_at_R[reads_R].min())
    return _Starving(ranks, nodes, since, state.now - since, silent_s)


def stuck_recovery(state: RunState) -> list[Finding]:
    """Find what holds up a recovery that takes far longer than any before it."""
    if state.phase not in _RECOVERING:
        return []
    limit = recovery_deadline(state)
    spent_s = state.now - state.phase_since
    if spent_s <= limit.seconds:
        return []
    if state.phase is RunPhase.RESTORING and patience.CUT_ANEW in state.way:
        # Ranks read for themselves, and move with whatever they have read. An agent that brings
        # state says nothing meanwhile.
        return _stuck_readers(state, limit)
    mark = world_mark(state)
    slow = tuple(n for n in state.world if state.nodes[n].mark <= mark)
    everyone = len(slow) == len(state.seated)
    ranks = () if everyone else tuple(r for n in slow for r in state.ranks_of(NodeId(n)))
    words = (
        f"{state.phase} for {spent_s:.1f} s, limit {limit}; "
        f"{'every node' if everyone else ', '.join(slow)} only {MARKS[mark]}"
    )
    return [_finding(state, ranks, state.phase_since, words)]


def _stuck_readers(state: RunState, limit: Deadline) -> list[Finding]:
    """Find who of those that read has not got on for longer than all of it may take.

    What is read is finite: who gets on comes to its end, however slow the store is.
    """
    fleet, since = state.fleet, state.phase_since
    stuck_R = fleet.phase_R == RankPhase.RESTORING
    reading = int(stuck_R.sum())
    if reading:
        stuck_R &= state.now - fleet.moved_at_R > limit.seconds
        since = max(since, Seconds(float(fleet.moved_at_R.min(where=stuck_R, initial=state.now))))
    else:
        # They are done, and not all nodes have said so.
        since = max(since, fleet.last_moved_at)
    if state.now - since <= limit.seconds:
        return []
    ranks = tuple(Rank(int(rank)) for rank in np.flatnonzero(stuck_R))
    who = f"{len(ranks)} of {reading} ranks" if len(ranks) < reading else "all ranks"
    words = (
        f"{state.phase} for {state.now - state.phase_since:.1f} s, and {who} that read have read "
        f"nothing for {state.now - since:.1f} s, limit {limit}"
    )
    return [_finding(state, ranks if len(ranks) < len(state.seats) else (), since, words)]


def recovery_deadline(state: RunState) -> Deadline:
    """Return how long the present phase of a recovery may take.

    What was never seen in this way is announced by its ranks, and has the time of what is. What was
    broken off may need more than any rule knows of, and has more each time, or a run whose bucket
    is slow would be begun again for ever. Up to a limit: each try that hangs costs a restart of the
    budget, which comes to its end in time only if they do.
    """
    before_s, usual = patience.broken_off_s(state), _usual_deadline(state)
    most_s = min(AGAIN_WARMUPS * state.timeouts.warmup_s, AGAIN_MAX_S)
    words = f"{AGAIN_FACTOR:g} x {before_s:.2f} s, after which it was broken off before"
    if AGAIN_FACTOR * before_s > most_s:
        words += f", and no more than {AGAIN_WARMUPS:g} x warmup_s or {AGAIN_MAX_S:g} s"
    return max(usual, Deadline(min(AGAIN_FACTOR * before_s, most_s), words))


def _usual_deadline(state: RunState) -> Deadline:
    t = state.timeouts
    if state.phase is RunPhase.STOPPING:
        return Deadline(t.abort_s + t.terminate_s + t.kill_s + t.form_s, "default, to end ranks")
    longest_s = patience.longest_s(state)
    if longest_s is None:
        return Deadline(t.warmup_s, "default, never seen in this way")
    return Deadline(
        min(max(LEARNED_FACTOR * longest_s, t.form_s), t.warmup_s),
        f"learned: {LEARNED_FACTOR:g} x the longest so far, {longest_s:.2f} s, "
        f"within {t.form_s:g} and {t.warmup_s:g} s",
    )


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


def _finding(state: RunState, ranks: tuple[Rank, ...], since: Seconds, words: str) -> Finding:
    fleet = state.fleet
    places = [
        f"rank {rank} on {state.seats[rank]}: {RankPhase(int(fleet.phase_R[rank])).name.lower()} "
        f"after step {fleet.step_of(rank)}, state {fleet.state_of(rank)}{collective(state, rank)}"
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
