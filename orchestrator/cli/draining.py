"""`holdfast drain` and `holdfast uncordon`: have nodes be free of a run, and be used again.

What is asked is left for the run's controller (worlds.requests); what comes of it is read from the
journal, like everything that is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import typer

from orchestrator.cli import listing, runs, units
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit, unknown
from orchestrator.cli.follow import Follower
from orchestrator.cli.reasons import require_reason
from orchestrator.cli.stop import NOBODY_S, user
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState
from orchestrator.policy import planned
from orchestrator.protocol.ids import NodeId
from orchestrator.worlds import requests
from orchestrator.worlds.requests import Request, Standing

LOOK_EVERY_S = 0.1
_ANSWERED = (Standing.RECORDED, Standing.REFUSED)


class Draining(NamedTuple):
    """Nodes that were asked to be free, and how far they are."""

    follower: Follower
    nodes: tuple[NodeId, ...]
    state: RunState

    def rows(self) -> list[dict[str, object]]:
        """Return the nodes as plain objects."""
        return [
            {
                "node": node,
                "condition": listing.condition(self.state, self.state.nodes[node]),
                "why": listing.why(self.state, self.state.nodes[node]),
                "incident": _incident(self.state, node),
            }
            for node in self.nodes
        ]


def drain(
    what: str,
    names: Sequence[str],
    run: str | None,
    *,
    reason: str,
    within_s: float | None,
    wait_s: float,
    output: Form,
) -> str:
    """Have nodes be free of a run; return what became of it once they are.

    Raises:
        CliError: if there are no such nodes, nobody decides, or it took longer than `wait_s`. The
            request stands in the last case.
    """
    require_reason(reason, may_be_empty=True)
    asked = _find(what, names, run)
    by = f"{user()} with `holdfast drain`"
    request = Request(ask="drain", nodes=asked.nodes, by=by, reason=reason, within_s=within_s)
    asked = _on_record(asked, request, wait_s)
    asked = _await(asked, wait_s)
    if output is Form.JSON:
        return msgspec.json.format(msgspec.json.encode(asked.rows())).decode()
    return "\n".join(
        f"{row['node']} is free{_told(asked.state, str(row['incident']))}" for row in asked.rows()
    )


def uncordon(
    what: str, names: Sequence[str], run: str | None, *, wait_s: float, output: Form
) -> str:
    """Have nodes be used again, or stay in use; return what they are now.

    Raises:
        CliError: if there are no such nodes, or nobody decides.
    """
    asked = _find(what, names, run)
    request = Request(ask="uncordon", nodes=asked.nodes, by=f"{user()} with `holdfast uncordon`")
    asked = _on_record(asked, request, wait_s)
    if output is Form.JSON:
        return msgspec.json.format(msgspec.json.encode(asked.rows())).decode()
    return "\n".join(map(_free_words, asked.rows()))


def _free_words(row: dict[str, object]) -> str:
    if row["condition"] == "Quarantined":
        # What is held against one of its devices is taken back by steps.
        return f"{row['node']} is not used yet: {row['why']}"
    return f"{row['node']} may be used: {row['condition']}"


def _find(what: str, names: Sequence[str], run: str | None) -> Draining:
    """Return the run and its nodes of these names, before anything is asked."""
    if what.removesuffix("s") != "node":
        raise unknown("kind", what, ("node",), "only nodes are drained")
    follower = Follower(runs.folder_of(run))
    state, damage = runs.state_of(follower)
    runs.require_whole(damage)
    if state.phase.final:
        raise CliError(
            f"{state.run.metadata.name} has ended: {state.end_state}, {state.end_reason}",
            "its nodes are free",
        )
    nodes = tuple(dict.fromkeys(NodeId(name.removeprefix("node/")) for name in names))
    for node in nodes:
        if node not in state.nodes:
            raise unknown("node", node, state.nodes, state.run.metadata.name)
    return Draining(follower, nodes, state)


def _on_record(asked: Draining, request: Request, wait_s: float) -> Draining:
    """Leave a request and wait until the controller has put it on record; else take it back."""
    folder = asked.follower.folder
    path = requests.leave(folder.requests, request)
    name = asked.state.run.metadata.name
    try:
        _wait(lambda: requests.standing(path) in _ANSWERED, min(NOBODY_S, wait_s))
    finally:
        taken_back = requests.take_back(path)
    came = requests.standing(path)
    if came is Standing.REFUSED:
        requests.forget_refused(path)
        raise CliError(
            f"the controller of {name} does not understand the request",
            "it is of another version than this command; see its log",
        )
    if came is Standing.CLAIMED:
        raise CliError(
            f"the controller of {name} has the request, and has not put it on record yet",
            f"it will; look with `holdfast describe node {asked.nodes[0]} --run {name}`",
            Exit.TIMED_OUT,
        )
    if taken_back:
        running = runs.controller_pid(folder) is not None
        raise CliError(
            f"no controller of {name} has taken the request up: {folder.root}",
            "it is busy or stopped (state T); look with `holdfast describe run`, and ask again"
            if running
            else "`holdfast run` with the same file goes on with it; then ask again",
            Exit.TIMED_OUT if running else Exit.ERROR,
        )
    state, damage = runs.state_of(asked.follower)
    runs.require_whole(damage)
    return asked._replace(state=state)


def _await(asked: Draining, wait_s: float) -> Draining:
    """Wait until nodes are free; say on the way what they wait for."""
    told = ""

    def over() -> bool:
        nonlocal told, asked
        state, damage = runs.state_of(asked.follower)
        runs.require_whole(damage)
        asked = asked._replace(state=state)
        waits = [node for node in asked.nodes if not _free(state, node)]
        words = "; ".join(f"{node} {planned.standing(state, node)}" for node in waits)
        if words not in ("", told):
            typer.echo(units.printable(words), err=True)
            told = words
        return not waits or any(node not in state.drains for node in waits) or state.phase.final

    done = _wait(over, wait_s)
    state, name = asked.state, asked.state.run.metadata.name
    cancelled = [node for node in asked.nodes if node not in state.drains]
    if cancelled and not state.phase.final:
        raise CliError(
            f"{', '.join(cancelled)} may be used again: somebody said so meanwhile",
            f"look with `holdfast describe node {cancelled[0]} --run {name}`",
        )
    if not done:
        waits = [node for node in asked.nodes if not _free(state, node)]
        raise CliError(
            f"not free {units.seconds(wait_s)} after it was asked for: {', '.join(waits)}; "
            f"{planned.standing(state, waits[0])}",
            f"the request stands; `holdfast uncordon node {waits[0]} --run {name}` takes it back",
            Exit.TIMED_OUT,
        )
    return asked


def _free(state: RunState, node: NodeId) -> bool:
    """Whether nothing of a run is left on a node that anybody needs: not its memory either."""
    if state.phase.final:
        return True
    # Until the new generation trains, its state may still be read from there.
    return state.drained(node) and (state.phase is RunPhase.TRAINING or state.incident is None)


def _incident(state: RunState, node: NodeId) -> str:
    """Return the incident that took a node out of the world for the drain; "" if there is none."""
    named = [i for i in state.incidents if node in i.nodes and i.kind == planned.KIND]
    drain = state.drains.get(node)
    since = [i.id for i in named if drain is not None and i.detected_at >= drain.asked_at]
    return since[-1] if since else ""


def _told(state: RunState, incident: str) -> str:
    if state.phase.final:
        return f": the run has ended, {state.end_state}"
    found = next((i for i in state.incidents if i.id == incident), None)
    if found is None:
        return ""
    return f", after {units.count(found.lost_steps, 'step')} done again ({found.id}: {found.rung})"


def _wait(over: Callable[[], bool], wait_s: float) -> bool:
    """Wait until something is so, at most so long; return whether it is."""
    deadline = time.monotonic() + wait_s
    while not over():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True
