"""How many replicas a world has: fewer while nodes are missing, and all again when they are there.

Replicas repeat each other's state, so a world can do without some of them: the batch stays what it
is, and a step takes longer. To wait for a node costs all that the run would do meanwhile.

Growing back is a restart as well, at the moment that costs least (`moments.py`). It pays once the
capacity that was lost since the last change is worth a restart: whoever waits for that, and no
longer, loses at most twice what the best choice would have cost, however nodes come and go. A
growth that was taken back before it had paid makes the next one wait twice as long, for a day: a
node that comes and goes does not take the run with it.

`GrowBack` is a detector in form, since what it finds is an incident with a cost in the ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf
from typing import NamedTuple

from orchestrator.core.events import Event, Telemetry, Tick
from orchestrator.core.incident import GROWTH, Cause, Finding
from orchestrator.core.patience import ON_A_NEW_NODE
from orchestrator.core.phases import RunPhase
from orchestrator.core.records import Resize
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.policy.moments import Moment, trains
from orchestrator.policy.planned import leaving
from orchestrator.policy.restarts import restart_s
from orchestrator.policy.switches import EXPECTED_LOSS, SHRINK, enabled
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.runfile import TrainingRun, seconds

ABSENCES_MIN = 3
"""Of fewer nodes that came back nobody knows how long it takes."""
DOUBLINGS_MAX = 10
RESTARTS = 2
"""That a growth costs which is taken back: the one with which it came, and the one that ends it."""


def nodes_for(run: TrainingRun, replicas: int) -> int:
    """Return how many nodes so many replicas take."""
    return replicas * run.shard_count // run.spec.nodes.ranks_per_node


def least(state: RunState) -> int:
    """Return with how few replicas the run goes on: all, if it may not shrink."""
    full = state.run.spec.parallelism.dp_replicate
    if not enabled(state, SHRINK):
        return full
    unit = state.run.block.replicas
    return min(-(-state.run.least_replicas // unit) * unit, full)


def fitting(state: RunState, nodes: int) -> int:
    """Return how many replicas so many nodes can hold; 0 if the run does not go on with as few."""
    unit = state.run.block
    found = min(nodes // unit.nodes * unit.replicas, state.run.spec.parallelism.dp_replicate)
    return found if found >= least(state) else 0


def wanted(state: RunState, nodes: int) -> int:
    """Return with how many replicas a restart goes on that has so many nodes; 0 for not at all.

    It takes along what has come meanwhile: it is paid for already.
    """
    found = fitting(state, nodes)
    if found > state.replicas and undone(state) and state.now < grows_at(state, found):
        return state.replicas
    return found


class Hope(NamedTuple):
    """Why a run waits for a node instead of going on with fewer replicas."""

    until: Seconds
    words: str


def hope(state: RunState, gone: Collection[NodeId], replicas: int) -> Hope | None:
    """Return until when a node is waited for before the run shrinks; None if it is not.

    A restart is due in either case; whoever shrinks has another one ahead, to grow back. As long as
    that costs it may wait, if nodes of this run mostly were back sooner: it loses no more than
    twice what it could have, even if this one is not.
    """
    if not 0 < replicas < state.replicas or len(state.absences_s) < ABSENCES_MIN:
        return None
    if not enabled(state, EXPECTED_LOSS):
        return None
    # What is unusable or cordoned will not be back by itself, however soon others were.
    kept_out = state.quarantined.keys() | state.drains.keys()
    away = [n for n in gone if n not in kept_out and not state.nodes[n].unusable]
    there = len(state.seated) - len(gone) + len(state.spares())
    if not away or fitting(state, there + len(away)) <= replicas:
        return None
    known_s = _usual_absence_s(state)
    worth_s = min(_growth_s(state, replicas), seconds(state.run.spec.recovery.spare_wait))
    since = max(state.nodes[node].lost_at for node in away)
    if known_s > worth_s or state.now >= since + worth_s:
        return None
    words = (
        f"waiting up to {worth_s:.1f} s for {', '.join(away)}: nodes that were lost came back "
        f"after {known_s:.1f} s, {_most(state)}, and to shrink and grow back costs a restart more"
    )
    return Hope(Seconds(since + worth_s), words)


def _growth_s(state: RunState, replicas: int) -> float:
    """Return what growing back from so many replicas costs, in seconds at full speed."""
    done, of = state.run.speed(replicas)
    return restart_s(state) * done / of


def _usual_absence_s(state: RunState) -> float:
    """Return the median time for which nodes were lost that came back, seconds."""
    return sorted(state.absences_s)[len(state.absences_s) // 2]


def _most(state: RunState) -> str:
    return f"the median of {len(state.absences_s)}"


class Frame(NamedTuple):
    """The places of a new world, a node each, in rank order."""

    places: tuple[NodeId | None, ...]
    """None where somebody is needed."""
    gone: dict[int, NodeId]
    """Who had the place that needs somebody; none of a replica that is new."""
    freed: tuple[NodeId, ...]
    """Usable nodes of replicas that are dissolved."""


def frame(state: RunState, gone: Collection[NodeId], replicas: int) -> Frame:
    """Return the places of a world of so many replicas. What lacks most nodes is dissolved.

    The others keep their ranks, but for the last of them, which take the ranks of what is dissolved
    before them: ranks are counted without a gap.
    """
    size, world = state.run.block.nodes, state.world
    if replicas == state.replicas:  # as nearly always
        return Frame(*_places(world, gone), freed=())
    blocks = [world[at : at + size] for at in range(0, len(world), size)]
    count = nodes_for(state.run, replicas) // size
    order = sorted(range(len(blocks)), key=lambda b: (_lacks(state, blocks[b], gone), b))
    kept, dissolved = sorted(order[:count]), sorted(order[count:])
    moving = iter([b for b in kept if b >= count])
    rows: list[Sequence[NodeId | None]] = [
        blocks[b if b in kept else next(moving)] for b in range(min(count, len(blocks)))
    ]
    rows += [(None,) * size] * (count - len(rows))
    places = [node for row in rows for node in row]
    freed = tuple(node for b in dissolved for node in blocks[b] if node not in gone)
    return Frame(*_places(places, gone), freed=freed)


def _places(
    places: Sequence[NodeId | None], gone: Collection[NodeId]
) -> tuple[tuple[NodeId | None, ...], dict[int, NodeId]]:
    """Return the places without who is gone, and who that is."""
    left = {place: node for place, node in enumerate(places) if node and node in gone}
    return tuple(None if place in left else node for place, node in enumerate(places)), left


def _lacks(state: RunState, nodes: Sequence[NodeId], gone: Collection[NodeId]) -> tuple[int, int]:
    """Return how many of some nodes are gone, and how many are to be free."""
    return sum(node in gone for node in nodes), sum(node in state.drains for node in nodes)


# Growing back ---------------------------------------------------------------------------------


class GrowBack:
    """Finds that the moment has come to go on with more replicas."""

    name = SHRINK

    def __init__(self) -> None:
        self._moment = Moment()

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return one finding when enough nodes are there, it pays, and the moment is good."""
        replicas = growing_to(state) if state.short and trains(state) else 0
        if not replicas or state.now < grows_at(state, replicas):
            self._moment.forget()
            return ()
        why = self._moment.good(state)
        if not why and isinstance(event, Telemetry | Tick):
            why = self._moment.still(state)
        # A restart would have to wait for one that may be back at once.
        if not why or not state.unfit.isdisjoint(state.seated):
            return ()
        return (_finding(state, replicas, why),)


def growing_to(state: RunState) -> int:
    """Return how many replicas the nodes that are there can hold; 0 if no more than there are."""
    found = fitting(state, _staying(state) + len(ready(state)))
    return found if found > state.replicas else 0


def _staying(state: RunState) -> int:
    """Return how many nodes of the world a larger one is made of: of spares, some are promised.

    A node that is to be free may keep its seat, but the next spare is there to take it.
    """
    return len(state.seated) - len(leaving(state))


def ready(state: RunState) -> list[NodeId]:
    """Return the spares that no world would have to wait for, sorted.

    A node joins before its processes are warm, and while they get so the others can train. How long
    it takes is known from worlds that began with such nodes.
    """
    new_s = [
        spent_s
        for (phase, way), spent_s in state.phase_times.items()
        if phase is RunPhase.STARTING and way.endswith(ON_A_NEW_NODE)
    ]
    since = state.now - max(new_s, default=0.0)
    return [node for node in state.spares() if state.nodes[node].here_since <= since]


def grows_at(state: RunState, replicas: int) -> Seconds:
    """Return from when on it pays to grow to so many replicas; infinite for never."""
    if not state.resizes:
        return Seconds(0.0)
    pays_after_s = _pays_after_s(state, state.replicas, replicas)
    if not enabled(state, EXPECTED_LOSS) and pays_after_s < inf:
        return Seconds(0.0)
    return Seconds(state.resizes[-1].at + pays_after_s * 2 ** undone(state))


def _pays_after_s(state: RunState, before: int, after: int) -> float:
    """Return how long fewer replicas have to be short of more to be worth a restart, seconds."""
    (done, of), (done_then, of_then) = state.run.speed(before), state.run.speed(after)
    now, then = done / of, done_then / of_then
    # Sooner than a loss is noticed, nobody knows that what is there is there to stay.
    least_s = state.timeouts.silence_s
    return max(restart_s(state) * now / (then - now), least_s) if then > now else inf


def undone(state: RunState) -> int:
    """Return how many growths of the last day did not last until they had paid."""
    since = state.now - DAY_S
    pairs = zip(state.resizes, state.resizes[1:], strict=False)
    count = sum(_undoes(state, grown, then) for grown, then in pairs if then.at >= since)
    return min(count, DOUBLINGS_MAX)


def _undoes(state: RunState, grown: Resize, then: Resize) -> bool:
    """Whether a growth was taken back before it had paid, for itself and for that."""
    if grown.after < grown.before or then.after > then.before:
        return False
    after_s = _pays_after_s(state, grown.before, grown.after)
    return then.at - grown.at < RESTARTS * after_s


def _finding(state: RunState, replicas: int, why: str) -> Finding:
    full = state.run.spec.parallelism.dp_replicate
    return Finding(
        at=state.now,
        since=state.now,
        kind=GROWTH,
        cause=Cause.PLANNED,
        step=state.reached_step,
        evidence=f"{_nodes(len(ready(state)))} free, enough for {replicas} of {full} replicas "
        f"instead of {state.replicas}; {why}",
    )


# In words -------------------------------------------------------------------------------------


def reason(state: RunState, replicas: int) -> str:
    """Say why a restart changes the number of replicas, and what comes of it; "" if it does not."""
    full = state.run.spec.parallelism.dp_replicate
    if replicas < (state.replicas or full):
        return (
            f"going on with {replicas} of {full} replicas, since no nodes are free for more: "
            f"{_slower(state, replicas)}{_hopeless(state, replicas)}"
        )
    if replicas > state.replicas > 0:
        return f"{replicas} of {full} replicas from now on instead of {state.replicas}"
    return ""


def _hopeless(state: RunState, replicas: int) -> str:
    """Say why it is not worth to wait for a node, if anything is known of that."""
    if not state.replicas or len(state.absences_s) < ABSENCES_MIN:
        return ""
    return (
        f"; a node that is lost is back after {_usual_absence_s(state):.0f} s ({_most(state)}), to "
        f"grow back costs {_growth_s(state, replicas):.0f} s"
    )


def _slower(state: RunState, replicas: int) -> str:
    done, of = state.run.speed(replicas)
    return f"the batch stays as it is, and a step takes {of / done:.2f} times as long"


def standing(state: RunState) -> str:
    """Say for a person how many replicas there are, and when there will be more."""
    full = state.run.spec.parallelism.dp_replicate
    if not state.short:
        return f"all {full}" if state.seats else "none yet"
    done, of = state.run.speed(state.replicas)
    words = f"{state.replicas} of {full}"
    if state.resizes:
        words += f" since {state.resizes[-1].at:.0f} s, for {state.shrunk_by or 'no incident'}"
    words += f"; speed {100 * done / of:.0f} %"
    if not (replicas := growing_to(state)):
        unit = state.run.block
        more = nodes_for(state.run, state.replicas + unit.replicas) - _staying(state)
        return f"{words}; grows back when {_nodes(more)} free and warm, {len(ready(state))} so far"
    at = grows_at(state, replicas)
    if at == inf:
        return f"{words}; {replicas} would be no faster"
    if state.now < at:
        return f"{words}; grows to {replicas}, which pays from {at:.0f} s on{_flaps(state)}"
    return f"{words}; grows to {replicas} with the next step in memory"


def _nodes(count: int) -> str:
    return "1 node is" if count == 1 else f"{count} nodes are"


def _flaps(state: RunState) -> str:
    times = undone(state)
    return f": {times} growths of the last day did not last" if times else ""


def possible(state: RunState, usable: int) -> int:
    """Return how many replicas so many nodes could hold, were the run to go on; 0 if it does."""
    unit = state.run.block
    found = min(usable // unit.nodes, state.run.spec.parallelism.dp_replicate) * unit.replicas
    return found if 0 < found < least(state) else 0


def refusal(state: RunState, usable: int) -> str:
    """Say why a run waits that could go on with fewer replicas; "" if it could not."""
    if not (replicas := possible(state, usable)):
        return ""
    full = state.run.spec.parallelism.dp_replicate
    told = state.run.spec.recovery.min_replicas
    why = f"spec.recovery.minReplicas is {'not set' if told is None else told}"
    if not enabled(state, SHRINK):
        why = f"spec.recovery.disable has {SHRINK}"
    return f"; {replicas} of {full} replicas could go on, but {why}"
