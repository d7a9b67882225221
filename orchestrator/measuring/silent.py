"""How soon silent corruption was noticed, and its node condemned, in the journal of a live run.

Looks are counted in steps: the run that is measured looks at every one of them. From the end of the
step that showed it until the order that takes the node away, time is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import Compared, Event, Reported, Telemetry, Together
from orchestrator.core.journal import Entry
from orchestrator.measuring.samples import Samples
from orchestrator.protocol.ids import NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import StateDiverged

LOOKS = "looks"
TELL = "tell"


class UnnoticedError(RuntimeError):
    """A corruption was not noticed, or laid at the door of somebody else."""


def take(entries: Iterable[Entry], *, kind: str, rank: Rank, node: NodeId, onset: Step) -> Samples:
    """Return after how many looks a corruption was noticed, and how long its order took.

    Args:
        entries: of a journal, in order.
        kind: of corruption.
        rank: who computes or holds what is wrong.
        node: whose rank it is.
        onset: the first step that has wrong numbers in it.

    Raises:
        UnnoticedError: if it was not noticed, not proven, or another node had to leave.
    """
    done: dict[Step, Seconds] = {}
    told: StateDiverged | None = None
    for entry in entries:
        event = entry.event
        _enter_steps(done, event)
        told = told or _told(event)
        orders = [each for each in entry.decisions if isinstance(each, StartGeneration)]
        if told is None or not orders:
            continue
        alone = told.nodes == (node,) or (not told.nodes and told.ranks == (rank,))
        if not (told.proven and alone) or node in orders[0].seats:
            raise UnnoticedError(
                f"{kind} on {node}, rank {rank}: expected it to be named alone, as proven, and to "
                f"be out of the next world; found {told.evidence}"
            )
        samples = Samples()
        # What is wrong in step n is in the state after step n - 1, or would be in that after n.
        samples.add(f"{LOOKS}-{kind}", told.step + 2 - onset)
        # Of a step that is thrown away the end is not told; the one before it was done earlier.
        shown_at = max((at for step, at in done.items() if step <= told.step + 1), default=event.at)
        samples.add(TELL, event.at - shown_at)
        return samples
    raise UnnoticedError(f"{kind} on {node} since step {onset} was not noticed")


def _told(event: Event) -> StateDiverged | None:
    fact = event.fact if isinstance(event, Compared | Reported | Together) else None
    return fact if isinstance(fact, StateDiverged) else None


def _enter_steps(done: dict[Step, Seconds], event: Event) -> None:
    """Enter when each step was done that an event tells of."""
    if not isinstance(event, Telemetry):
        return
    at = event.at - event.since_step_s
    for report in reversed(event.reports):
        done[report.step] = Seconds(at)
        at -= report.seconds
