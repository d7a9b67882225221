"""`holdfast describe`: everything about one thing, for somebody who was just woken up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from orchestrator.cli import devices, listing, runs, story, units, window
from orchestrator.cli.blocks import facts, ledger_lines, section
from orchestrator.cli.checkpoints import condition, why_untrusted
from orchestrator.cli.errors import CliError, Exit, unknown
from orchestrator.cli.follow import Follower
from orchestrator.cli.history import History
from orchestrator.cli.incident import incident_lines
from orchestrator.cli.reporting import fault_line
from orchestrator.cli.tables import grid
from orchestrator.core import watching
from orchestrator.core.journal import JournalError
from orchestrator.core.records import Node
from orchestrator.core.report import fault_reports, reduction
from orchestrator.core.state import RunState
from orchestrator.policy import shrinking
from orchestrator.protocol.ids import NodeId, Step
from orchestrator.protocol.messages import MARKS
from orchestrator.protocol.steps import EvaluationLine, StepLine
from orchestrator.worlds.folder import JOURNAL, RunFolder, former_journals

SHOWN_MAX = 10
"""Rows of a section; the lists of `holdfast get` are complete."""
L = TypeVar("L", EvaluationLine, StepLine)
SOURCES_SHOWN = 4
"""Of those that were evaluated, so many are told with their losses."""
LINE_BYTES_MAX = 1 << 18
"""Of a line of the trainer's notes; it has nine numbers."""


def describe(what: str, name: str | None, run: str | None) -> tuple[str, JournalError | None]:
    """Return everything about one thing, in words, and what is wrong with its journal.

    Raises:
        CliError: if there is no such kind, run or thing.
        JournalError: if nothing of the journal can be trusted.
    """
    kinds = ("run", "incident", "node", "checkpoint", "device")
    if what.removesuffix("s") not in kinds:
        raise unknown("kind", what, kinds, "holdfast describe")
    what = what.removesuffix("s")
    if what == "device":
        return devices.described(name, run), None
    if what == "run" and name is not None and run is not None and name != run:
        raise CliError(f"two runs are named, {name!r} and {run!r}", "name the run once", Exit.USAGE)
    folder = runs.folder_of(name if what == "run" and name is not None else run)
    history = History()
    # Of a node or a checkpoint all that ever happened is told; of an incident, what did meanwhile.
    follower = Follower(folder, history.take if what in ("node", "checkpoint") else None)
    state, damage = runs.state_of(follower)
    name = name.partition("/")[2] or name if name else None  # `get -o name` prints kind/name
    where = folder.root.name
    try:
        match what:
            case "run":
                lines = run_lines(follower, state)
            case "incident":
                index = _incident_named(state, name, where)
                damage = _look_back(folder, state, index, history) or damage
                lines = incident_lines(index, state, history)
            case "node":
                lines = node_lines(_node_named(state, name, where), state, history)
            case _:
                lines = checkpoint_lines(_step_named(state, name, where), state, history)
    except CliError:
        # It may stand behind the damage.
        runs.require_whole(damage)
        raise
    return units.printable("\n".join(lines)), damage


def _look_back(
    folder: RunFolder, state: RunState, index: int, history: History
) -> JournalError | None:
    """Take in what happened in the time of an incident; return what is wrong with that part."""
    incident = state.incidents[index]
    end = state.now if incident.resumed_at is None else incident.resumed_at
    try:
        for entry in window.entries(folder.journal, incident.since, end):
            history.take(entry)
    except JournalError as error:
        return error
    return None


# A run ----------------------------------------------------------------------------------------


def run_lines(follower: Follower, state: RunState) -> list[str]:
    """Describe a run: where it stands, what it spent, and every timeout with its rule."""
    spent = {str(bucket): us / 1e6 for bucket, us in state.ledger.totals().items()}
    return [
        *facts(_where(follower, state)),
        *section("Spent", ledger_lines(spent)),
        *section("World", _world(state)),
        *section("Incidents", _table("incidents", state, follower)),
        *section("Checkpoints", _table("checkpoints", state, follower)),
        *section("Saves that failed", _save_failures(state)),
        *section("Restart budgets", _budgets(state)),
        *section("Timeouts, all from detectWithin", _timeouts(state)),
        *section("Faults injected", [fault_line(fault) for fault in fault_reports(state)]),
        *section("Not to be trusted", _doubts(follower, state)),
    ]


def _where(follower: Follower, state: RunState) -> list[tuple[str, str]]:
    spec = state.run.spec
    p = spec.parallelism
    pid = runs.controller_pid(follower.folder)
    rungs = ", ".join(f"{rung} {count}" for rung, count in sorted(state.rungs.items()))
    loss = state.losses.get(state.reached_step)
    return [
        ("Name", state.run.metadata.name),
        ("State", state.end_state or f"{state.phase} since {units.clock(state.phase_since)}"),
        ("Reason", state.end_reason),
        ("Step", f"{state.reached_step} of {spec.trainer.steps}"),
        ("Loss", units.loss(loss) if state.reached_step in state.losses else ""),
        ("Speed", f"{units.rate(state.tokens_per_s)} tokens/s" if state.tokens_per_s else ""),
        ("Arithmetic", _arithmetic(follower.folder)),
        ("Evaluation", _evaluation(follower.folder)),
        ("Wall clock", units.seconds(state.now)),
        ("ETTR", units.percent(state.ledger.effective_ratio)),
        ("Generation", f"{state.generation} ({rungs or 'none was started'})"),
        ("Controller", _controller_words(state, pid)),
        ("Parallelism", _parallelism(state)),
        ("Reduction", reduction(state.run)),
        ("Replicas", shrinking.standing(state) if p.dp_replicate > 1 else ""),
        ("Digests", watching.digests(state.run, state.replicas)),
        ("Replays", watching.replays(state.run, state.replicas)),
        ("Saves", _saves(state)),
        ("Folder", str(follower.folder.root)),
        ("Life", _life(follower.folder)),
        ("Journal", f"{units.count(follower.entries, 'event')}{_torn(follower)}"),
    ]


def _arithmetic(folder: RunFolder) -> str:
    """Say how fast the newest step was, as the trainer noted it; "" if it notes nothing."""
    line = _newest(folder.steps, StepLine)
    if line is None:
        return ""
    share = f", MFU {units.percent(line.mfu)}" if line.mfu is not None else ""
    return f"{line.tflops_per_gpu:.3g} TFLOPS per rank{share} (step {line.step})"


def _evaluation(folder: RunFolder) -> str:
    """Say what the newest evaluation came to; "" if there is none."""
    line = _newest(folder.evaluations, EvaluationLine)
    if line is None:
        return ""
    told = [f"; {name} {units.loss(loss)}" for name, loss in line.sources.items()]
    more = len(told) - SOURCES_SHOWN
    each = "".join(told[:SOURCES_SHOWN]) + (f"; {more} more" if more > 0 else "")
    samples = units.count(line.samples, "sample")
    return f"loss {units.loss(line.loss)} on {samples} after step {line.step}{each}"


def _newest(path: Path, kind: type[L]) -> L | None:
    """Return the last whole line of a file of JSON lines; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - LINE_BYTES_MAX, 0))
        whole = file.read().rpartition(b"\n")[0]
    return msgspec.json.decode(whole.rpartition(b"\n")[2], type=kind) if whole else None


def _controller_words(state: RunState, pid: int | None) -> str:
    if state.phase.final:
        return f"ended; the run had {state.incarnation}"
    if pid is None:
        return (
            f"gone (was number {state.incarnation}); nobody has written since "
            f"{units.clock(state.now)}"
        )
    return f"number {state.incarnation}, process {pid}"


def _parallelism(state: RunState) -> str:
    return str(state.run.layout)


def _saves(state: RunState) -> str:
    """Say how often the run saves, why, and what a save was found to cost."""
    auto = state.run.spec.checkpoint.every == "auto"
    if state.cadence_reason:
        return state.cadence_reason
    begun = f"memory every {state.cadence.memory} steps, durable every {state.cadence.durable}"
    why = "where it begins: too little is known of what saves cost" if auto else "by the run file"
    seen = state.experience
    if not seen.saves:
        return f"{begun}, {why}"
    return f"{begun}, {why}; a save stalls {seen.stall_mean_s * 1e3:.1f} ms"


def _life(folder: RunFolder) -> str:
    """Say which life of a run this is, and how others are looked at; "" if there are no others."""
    if folder.journal.name != JOURNAL:
        return f"a former one, {folder.journal.name}"
    former = [path.name for path in former_journals(folder)]
    if not former:
        return ""
    return (
        f"the last; of the {units.count(len(former), 'former one')} "
        f"`holdfast report {folder.root / former[0]}` is the newest"
    )


def _torn(follower: Follower) -> str:
    return f"; {follower.torn}" if follower.torn else ""


def _world(state: RunState) -> list[str]:
    rows = [
        [
            node.id,
            listing.condition(state, node),
            ", ".join(map(str, state.ranks_of(node.id))) or "-",
            units.first_line(listing.why(state, node)) or "-",
        ]
        for _, node in sorted(state.nodes.items())
    ]
    return grid(["NODE", "CONDITION", "RANKS", "WHY"], rows).splitlines() if rows else []


def _table(kind: str, state: RunState, follower: Follower) -> list[str]:
    _, columns, rows = listing.KINDS[kind]
    all_rows = rows(state, follower.folder)
    # Incidents come oldest first, checkpoints newest first; the newest are what matters.
    shown = all_rows[-SHOWN_MAX:] if kind == "incidents" else all_rows[:SHOWN_MAX]
    if not shown:
        return []
    kept = [column for column in columns if not column.wide]
    cells = [[units.first_line(c.show(row[c.key])) for c in kept] for row in shown]
    lines = grid([column.title for column in kept], cells).splitlines()
    more = len(all_rows) - len(shown)
    return lines + ([f"and {more} more: holdfast get {kind}"] if more else [])


def _save_failures(state: RunState) -> list[str]:
    return [
        f"{units.clock(at)}  {f'step {step}: ' if step else ''}{units.first_line(reason)}"
        for at, step, reason in state.save_failures[-SHOWN_MAX:]
    ]


def _budgets(state: RunState) -> list[str]:
    rows = [
        [origin, str(budget.left), str(budget.limit)] for origin, budget in state.budgets.items()
    ]
    return grid(["ORIGIN", "LEFT (restarts)", "LIMIT (restarts)"], rows).splitlines()


def _timeouts(state: RunState) -> list[str]:
    rows = [[name, f"{value:g}", rule] for name, value, rule in state.timeouts.table()]
    detect = f"{state.timeouts.detect_within_s:g}"
    rows.insert(0, ["detect_within_s", detect, "spec.detection.detectWithin"])
    return grid(["TIMEOUT", "VALUE (s)", "RULE"], rows).splitlines()


def _doubts(follower: Follower, state: RunState) -> list[str]:
    doubts = [
        f"step {step} gave another loss when it was computed again"
        for step in sorted(set(state.divergences))[:SHOWN_MAX]
    ]
    doubts += [
        f"step {step} had other bits when it was computed again"
        for step in sorted(set(state.digests_differ))[:SHOWN_MAX]
    ]
    assert follower.controller is not None
    doubts += [
        f"detector {name} raised and was switched off: {error}"
        for name, error in sorted(follower.controller.disabled.items())
    ]
    doubts += [story.off(fact) for _, fact in sorted(state.detectors_off.items())]
    return doubts + ([state.devices_problem] if state.devices_problem else [])


# A node ---------------------------------------------------------------------------------------


def node_lines(node_id: NodeId, state: RunState, history: History) -> list[str]:
    """Describe a node: its condition, what it runs, what it holds, what happened to it."""
    node = state.nodes[node_id]
    mark = f"{MARKS[node.mark]} in generation {node.generation}" if node.generation else ""
    held = listing.held_by(state, node_id)
    incidents = [i for i in state.incidents if node_id in i.nodes]
    return [
        *facts(
            [
                ("Name", str(node_id)),
                ("Run", state.run.metadata.name),
                ("Condition", listing.condition(state, node)),
                ("Why", listing.why(state, node)),
                ("Ranks", ", ".join(map(str, state.ranks_of(node_id)))),
                ("Came as far as", mark),
                ("Incarnation", f"{node.incarnation} (starts of its agent)"),
                ("Joined", units.clock(node.joined_at)),
                ("Heard", f"{units.seconds(state.now - state.hearing.heard_at(node.id))} ago"),
            ]
        ),
        *section("Devices", devices.of_node(state, node)),
        *section("What its hardware says", _symptoms(node)),
        *section(
            "In its memory",
            [f"step {step}: shards of ranks {', '.join(map(str, r))}" for step, r in held.items()],
        ),
        *section(
            "Incidents that name it",
            [f"{i.id}  {units.clock(i.since)}  {i.findings[0].evidence}" for i in incidents],
        ),
        *section(
            "What happened",
            [f"{units.clock(at)}  {text}" for at, text in history.of_node(node_id)],
        ),
    ]


def _symptoms(node: Node) -> list[str]:
    told = [
        f"{symptom.words}{'; to be swapped for a spare' if symptom.drain else ''}"
        for symptom in node.symptoms
    ]
    told += [f"not all of it is read: {why}" for why in node.unread]
    return told + [f"degraded: {why}" for why in node.lacking]


# A checkpoint ---------------------------------------------------------------------------------


def checkpoint_lines(step: Step, state: RunState, history: History) -> list[str]:
    """Describe the state after a step: where copies of it are, and who holds what."""
    lines = facts(
        [("Step", str(step)), ("Run", state.run.metadata.name), ("Loss", _loss_at(state, step))]
    )
    for commit in (c for c in state.commits if c.step == step):
        order = history.commits.get(step)
        size = sum(receipt.size for receipt in order.receipts) if order else 0
        told = [
            ("State", condition(state, commit)),
            ("Why", commit.rejected or why_untrusted(state, commit)),
            ("Key", commit.key),
            ("Epoch", f"{commit.epoch} (the generation that wrote it)"),
            ("Committed", units.clock(commit.at)),
            ("Model", order.model if order else ""),
            (
                "Size",
                f"{units.size(size)} in {units.count(len(order.receipts), 'shard')}"
                if order
                else "",
            ),
        ]
        lines += section("Durable tier", facts(told))
    lines += section("Verdicts", _verdicts(step, history))
    failed = [f for f in state.save_failures if f[1] == step and not f[2].startswith("barred: ")]
    lines += section(
        "Saves that failed", [f"{units.clock(at)}  {reason}" for at, _, reason in failed]
    )
    ranks = [] if state.phase.final else state.holdings.of(step).ranks()
    rows = [[str(rank), ", ".join(state.holders(step, rank)) or "-"] for rank in ranks]
    if rows:
        lines += section("Memory", grid(["SHARD OF RANK", "HELD BY"], rows).splitlines())
    bad = [(node, rank, what) for (at, node, rank), what in state.bad_copies.items() if at == step]
    words = [
        f"shard of rank {rank} on {node}: {what or 'replaced, or let go, since'}"
        for node, rank, what in sorted(bad)
    ]
    lines += section("Copies that were found bad by others", words)
    wrong = [
        f"what rank {rank} staged: its state may have been wrong before that"
        for rank in sorted(state.distrusted.get(step, ()))
    ]
    lines += section("Copies that nobody starts from", wrong)
    return lines


def _verdicts(step: Step, history: History) -> list[str]:
    return [
        f"{units.clock(judged.at)}  {judged.verdict} (epoch {judged.epoch}): {judged.reason}"
        for judged in history.verdicts
        if judged.step == step
    ]


def _loss_at(state: RunState, step: Step) -> str:
    return units.loss(state.losses[step]) if step in state.losses else ""


# Names ----------------------------------------------------------------------------------------


def _incident_named(state: RunState, name: str | None, where: str) -> int:
    ids = [str(incident.id) for incident in state.incidents]
    if name is None and ids:
        return len(ids) - 1
    if name not in ids:
        raise unknown("incident", name or "", ids, where)
    return ids.index(name)


def _node_named(state: RunState, name: str | None, where: str) -> NodeId:
    if name is None:
        names = ", ".join(sorted(state.nodes))
        raise CliError("no node is named", f"one of {names or '(none has joined)'}", Exit.USAGE)
    if name not in state.nodes:
        raise unknown("node", name, state.nodes, where)
    return NodeId(name)


def _step_named(state: RunState, name: str | None, where: str) -> Step:
    steps = {commit.step for commit in state.commits}
    if not state.phase.final:
        steps |= set(state.holdings)
    if name is None and steps:
        return max(steps)
    # Of what came to nothing there is something to say, too: why.
    steps |= {step for _, step, _ in state.save_failures if step}
    names = [f"step-{step}" for step in sorted(steps, reverse=True)]
    wanted = f"step-{name}" if name and name.isdigit() else name or ""
    if wanted not in names:
        raise unknown("checkpoint", wanted, names, where)
    return Step(int(wanted.removeprefix("step-")))
