"""What becomes of a rank that is slow: it is measured beside its peers, and only then judged.

Who computes for longer may have a slow device, or more to compute than anybody counted. The same
short work on the suspect and on peers tells: where that takes longer, too, it is the device.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.core import symptoms
from orchestrator.core.decisions import Decision, ProbeRanks
from orchestrator.core.incident import STRAGGLER, Cause, Clock, Incident, Note
from orchestrator.core.records import Slow
from orchestrator.core.state import RunState, decide
from orchestrator.protocol.ids import NodeId, Rank, Seconds
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import RankProbed
from orchestrator.protocol.rank import Speed

PROBE_S = 1.0
"""For which ranks measure at most; all others wait for as long."""
PROBE_SHARE = 0.5
"""Of how long a world may stand still."""
ANSWER_STEPS = 4
"""A rank that has not answered within so many steps, and a phase of recovery, never will."""
PEERS_PROBED = 2
EXPLAINED = 0.5
"""Share of its slowness that a probe has to show for the device to be at fault. Half: a probe that
shows it is taken at the word of its numbers, with as much room for noise on either side."""
CORE_SHARE = 0.5
"""Of the time for which peers are measured, they have to have a processor, or a wall clock tells
who was lucky. Half is far from what they have where they are alone, and where many want a core."""
SLOW_MAX = 256
"""Suspicions that are remembered, the newest."""


def suspect(state: RunState, incident: Incident) -> None:
    """Enter who is slow, as an incident says that is over at once: training goes on."""
    finding = incident.findings[0]
    incident.rung, incident.reason = "none", "slow, and not known why yet: it is being measured"
    incident.decided_at = incident.resumed_at = state.now
    ratio, share = finding.measure
    slow = Slow(
        incident=incident.id,
        rank=finding.ranks[0],
        node=finding.nodes[0],
        incarnation=state.nodes[finding.nodes[0]].incarnation,
        generation=state.generation,
        since=finding.since,
        ratio=ratio,
        share=share,
        clock=finding.clock,
    )
    state.slow[slow.incident] = state.slow_unjudged[slow.incident] = slow
    for name in list(state.slow)[:-SLOW_MAX]:
        old = state.slow.pop(name)
        state.slow_unjudged.pop(name, None)
        if state.slow_devices.get(old.node) is old:
            del state.slow_devices[old.node]


def look(state: RunState) -> list[Decision]:
    """Have suspects be measured, one after the other; give up on those that do not answer."""
    if not state.slow_unjudged:
        return []
    for slow in list(state.slow_unjudged.values()):
        if slow.generation != state.generation:
            _close(state, slow, "unknown", "its generation ended before it was measured")
        elif slow.asked_at is not None and state.now > _answer_by(state, slow.asked_at):
            _close(state, slow, "unknown", "it was not measured in time")
    waiting = list(state.slow_unjudged.values())
    if not waiting or any(slow.asked_at is not None for slow in waiting):
        return []
    return [_probe(state, waiting[0])]


def _probe(state: RunState, slow: Slow) -> Decision:
    state.probes += 1
    slow.asked_at, slow.number = state.now, state.probes
    slow.peers = slow.peers if slow.again else _peers(state, slow.rank, slow.clock)
    ranks = (slow.rank, *slow.peers)
    hang_s = state.timeouts.hang_s
    return decide(
        state,
        ProbeRanks,
        f"rank {slow.rank} on {slow.node} is {slow.ratio:.2f} times as slow as its peers: is it "
        f"the device? measured beside rank {' and rank '.join(map(str, slow.peers)) or 'nobody'}",
        number=slow.number,
        ranks=ranks,
        nodes=tuple(state.seats[rank] for rank in ranks),
        within_s=min(PROBE_S, PROBE_SHARE * hang_s),
    )


def _answer_by(state: RunState, asked_at: Seconds) -> float:
    return asked_at + ANSWER_STEPS * state.step_times.quantile(0.99) + state.timeouts.form_s


@lru_cache(maxsize=4)
def alike(layout: Layout, world_size: int) -> npt.NDArray[np.int64]:
    """Return a number for each rank, shape [R], that is the same for ranks with equal work."""
    cuts: dict[tuple[int, int, int], int] = {}
    numbers = np.empty(world_size, np.int64)
    for rank in range(world_size):
        at = layout.position(rank)
        numbers[rank] = cuts.setdefault((at.pp, at.tp, at.cp), len(cuts))
    return numbers


def _peers(state: RunState, rank: Rank, clock: Clock) -> tuple[Rank, ...]:
    """Return peers of a rank that are neither fast nor slow, on other nodes where there are."""
    number_R = alike(state.run.layout, len(state.seats))
    suspects = {slow.rank for slow in state.slow.values() if slow.generation == state.generation}
    others_R = number_R == number_R[rank]
    others_R[[rank, *(each for each in suspects if each < len(number_R))]] = False
    others = np.flatnonzero(others_R)
    if not len(others) or not state.paces.full:
        return ()
    rate = state.paces.rate_R(state.paces.known(clock))[others]
    here = np.isin(others, state.ranks_of(state.seats[rank]))
    order = np.lexsort((others, np.abs(rate - np.median(rate)), here))
    return tuple(Rank(int(each)) for each in others[order[:PEERS_PROBED]])


def answer(state: RunState, fact: RankProbed) -> None:
    """Take in what a rank measured; judge once everybody has answered."""
    slow = next((s for s in state.slow_unjudged.values() if _asked(s, fact)), None)
    if slow is None:
        return
    slow.answers[fact.rank] = fact.speed
    if len(slow.answers) == 1 + len(slow.peers):
        _judge(state, slow)


def _asked(slow: Slow, fact: RankProbed) -> bool:
    asked = slow.asked_at is not None and slow.number == fact.number
    return asked and (fact.rank == slow.rank or fact.rank in slow.peers)


def _judge(state: RunState, slow: Slow) -> None:
    own = slow.answers[slow.rank]
    problems = [f"rank {r}: {s.problem}" for r, s in sorted(slow.answers.items()) if s.problem]
    others = [slow.answers[rank] for rank in slow.peers]
    if problems or not others:
        _close(state, slow, "unknown", "; ".join(problems) or "there was nobody to compare it with")
        return
    all_of_them = (own, *others)
    elapsed = _Times.of([(speed.operations, speed.copied) for speed in all_of_them], min)
    busy = _Times.of([(speed.busy_operations, speed.busy_copied) for speed in all_of_them], median)
    needed = EXPLAINED * (slow.ratio - 1)
    told, in_processor = busy or elapsed, slow.clock == "processor" and busy is not None
    looked_at = (busy, None if in_processor else elapsed)
    shown = next((found for found in looked_at if found and found.most - 1 >= needed), None)
    if told is None:
        _close(state, slow, "unknown", "nothing could be measured")
    elif shown is None:
        words = f"measured: {told.words}: its device is as fast as theirs"
        _close(state, slow, "workload", words)
    elif shown is elapsed and not all(map(_had_its_core, others)):
        words = f"measured: {shown.words}, but those did not get their cores either"
        _close(state, slow, "unknown", words)
    elif busy is None or slow.again or busy.computes - 1 >= needed:
        how = (" twice" if slow.again else "") + (" in processor time" if shown is busy else "")
        _close(state, slow, "hardware", f"measured{how}: {shown.words}")
    else:
        # Ranks and other programs that want the same cores, or the same memory, have them in turn:
        # who had less of them for a second may have more in the next. A slow device has not.
        slow.again, slow.asked_at, slow.answers = True, None, {}


def _had_its_core(speed: Speed) -> bool:
    """Whether a rank had a processor for most of the time that it was measured, if that is known.

    Where ranks wait for cores most of the time, by chance one waits twice as long as another.
    """
    return speed.operations >= CORE_SHARE * speed.busy_operations


class _Times(NamedTuple):
    """How a rank's speed compares with its peers'."""

    computes: float
    """Times as many operations as it that they do."""
    copies: float
    """Times as many bytes that the slowest of them copies: with others, chance decides."""
    words: str

    @property
    def most(self) -> float:
        """By what it is slowest at."""
        return max(self.computes, self.copies)

    @classmethod
    def of(
        cls, speeds: list[tuple[float, float]], usual: Callable[[list[float]], float]
    ) -> _Times | None:
        """Return that of the first one; None if it was not measured.

        Args:
            speeds: operations and bytes copied per second, of all.
            usual: of operations of the others, what it is compared with.
        """
        (operations, copied), *others = speeds
        computes = _times(operations, usual([each for each, _ in others]))
        copies = _times(copied, min(each for _, each in others))
        if computes is None and copies is None:
            return None
        computes, copies = computes or 1.0, copies or 1.0
        words = (
            f"{operations / 1e9:.3g} Gop/s and {copied / 1e9:.3g} GB/s, its peers "
            f"{computes:.2f} and {copies:.2f} times as much"
        )
        return cls(computes, copies, words)


def _times(own: float, other: float) -> float | None:
    return other / own if own > 0 and other > 0 else None


_CAUSES = {"hardware": Cause.HARDWARE, "workload": Cause.SOFTWARE, "unknown": Cause.UNKNOWN}
_REASONS = {
    "hardware": "its device is slow; it is swapped for a spare if that pays",
    "workload": "it has more to compute than its peers, or waits for samples; nobody is to blame",
    "unknown": "whose fault it is can not be told; nothing is done",
}


def _close(state: RunState, slow: Slow, verdict: str, words: str) -> None:
    if told := symptoms.words(state, slow.node):
        words = f"{words}; its hardware says: {told}"
    slow.verdict, slow.words, slow.judged_at = verdict, words, state.now
    del state.slow_unjudged[slow.incident]
    if verdict == "hardware":
        state.slow_devices[slow.node] = slow
    incident = next(i for i in reversed(state.incidents) if i.id == slow.incident)
    incident.cause, incident.reason = _CAUSES[verdict], f"{words}; {_REASONS[verdict]}"
    incident.timeline.append(Note(at=state.now, text=f"verdict {verdict}: {words}"))


def is_straggler(incident: Incident) -> bool:
    """Whether an incident is about somebody slow, and broke nothing."""
    return incident.findings[0].kind == STRAGGLER


def now(state: RunState, slow: Slow) -> float | None:
    """Return how slow a node is by the last windows; None if this generation has too few.

    Times the median of its peers that its slowest rank takes, the median over windows, from 0, by
    the clock that it was found by.
    What was measured once is as old as that; a device that was hot may have cooled down.
    """
    if state.paces.alike:
        return 1.0
    if not state.paces.full:
        return None
    clock = state.paces.known(slow.clock)
    ratio_R = state.paces.ratio_R(alike(state.run.layout, len(state.seats)), clock)
    return max((float(ratio_R[rank]) for rank in state.ranks_of(slow.node)), default=None)


def shares(state: RunState, slows: list[Slow]) -> list[tuple[Slow, float]]:
    """Return, the slowest first, what share of a step is gained without each as well.

    Once it and all that are slower are gone, that is.

    Args:
        state: of the run.
        slows: of nodes that have seats, at most one of each node.
    """
    if not slows or not state.paces.full:
        # Of the first steps of a generation nobody knows: what was found in an older one counts.
        return [(slow, slow.share) for slow in sorted(slows, key=lambda s: (-s.share, s.node))]
    time_R, step_s = state.paces.time_R(), state.step_times.quantile(0.5)
    ranks_of = {slow.node: list(state.ranks_of(slow.node)) for slow in slows}
    time_s = {node: float(time_R[ranks].max()) for node, ranks in ranks_of.items()}
    slows = sorted(slows, key=lambda slow: (-time_s[slow.node], slow.node))
    others_s = state.paces.slowest_s(tuple(rank for ranks in ranks_of.values() for rank in ranks))
    next_s = [max(time_s[slow.node], others_s) for slow in slows[1:]] + [others_s]
    return [
        (slow, min(max(time_s[slow.node] - then_s, 0.0) / step_s, 1.0) if step_s else 0.0)
        for slow, then_s in zip(slows, next_s, strict=True)
    ]


def slow_since(state: RunState, since: Seconds) -> dict[NodeId, Slow]:
    """Return the nodes whose device was found to be slow, unless they came back after that.

    An agent that was started again has been somewhere: on a machine that was repaired, for one.
    """
    nodes = state.nodes
    return {
        node: slow
        for node, slow in state.slow_devices.items()
        if slow.judged_at >= since and nodes[node].incarnation == slow.incarnation
    }


def explained(state: RunState, rank: Rank, clock: Clock) -> float:
    """Return how slow a rank was, at most, when its device was measured to be fast; or 1.

    By that clock, or by processor time: who has more to compute takes longer by either.
    """
    return max(
        (
            slow.ratio
            for slow in state.slow.values()
            if (slow.rank, slow.generation, slow.verdict) == (rank, state.generation, "workload")
            and slow.clock in (clock, "processor")
        ),
        default=1.0,
    )
