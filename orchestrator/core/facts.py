"""What each fact changes in the state. News of an older generation is dropped here, only here."""

from __future__ import annotations

from orchestrator.core import (
    copies,
    devices,
    drains,
    durable,
    heritage,
    inspection,
    marks,
    observing,
    quarantine,
    repairs,
    slowness,
    symptoms,
    vouching,
)
from orchestrator.core.decisions import RestoreFrom
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    Compared,
    ControllerStarted,
    CopiesHeld,
    DeviceJudged,
    DevicesKnown,
    DrainCancelled,
    DrainRequested,
    Event,
    FaultInjected,
    Inherited,
    NodeDisconnected,
    NodeLost,
    Reported,
    SearchFailed,
    Telemetry,
    Together,
)
from orchestrator.core.phases import RunPhase
from orchestrator.core.records import Node
from orchestrator.core.standing import Proof
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import (
    MARKS,
    DetectorFailed,
    Fact,
    FaultCarriedOut,
    Joined,
    LinkTimed,
    NodeAiling,
    NodeUnusable,
    Preflighted,
    PreparationFailed,
    Prepared,
    RankExited,
    RankProbed,
    RanksFinished,
    RanksTroubled,
    Reached,
    ShardsHeld,
    ShardsStaged,
    ShardsWritten,
    StacksTaken,
    StateDiverged,
    StateRepaired,
    WriteFailed,
)


def apply(  # noqa: C901, PLR0912, PLR0915 - one line per event
    state: RunState, event: Event
) -> None:
    """Change the state by what the event says, and by nothing else."""
    match event:
        case ControllerStarted():
            _take_over(state, event)
        case Inherited():
            heritage.inherit(state, event)
        case Reported(node=node, fact=Joined() as joined):
            _join(state, node, joined)
        case Reported(node=node, fact=fact):
            if node in state.nodes:
                state.hearing.hear(node, state.now)
                _take(state, state.nodes[node], fact)
        case Together(nodes=nodes, fact=fact):
            _take_together(state, nodes, fact)
        case CopiesHeld(generation=generation):
            if generation == state.generation:
                copies.hold_together(state, event)
        case NodeDisconnected(node=node):
            if node in state.nodes:
                state.nodes[node].connected = False
                state.weigh(state.nodes[node])
        case NodeLost(node=node, evidence=evidence):
            if node in state.nodes:
                give_up(state, node, evidence)
        case Telemetry():
            _hear(state, event)
            if event.generation == state.generation and state.seats:
                observing.observe(state, event)
        case Compared(fact=fact):
            _compare(state, fact)
        case CheckpointFound() | SearchFailed() if not durable.answers(state, event):
            pass  # its search was given up; what has happened since it does not know
        case CheckpointFound():
            durable.find(state, event)
        case SearchFailed(reason=reason, again=again):
            durable.fail_search(state, reason, again=again)
        case CheckpointCommitted():
            durable.commit(state, event)
        case CheckpointJudged():
            durable.judge(state, event)
        case CommitFailed():
            durable.fail_commit(state, event)
        case FaultInjected(index=index, description=text, target=target):
            state.injected.setdefault(index, (state.now, text, target))
        case DrainRequested():
            drains.request(state, event)
        case DrainCancelled(nodes=nodes):
            drains.cancel(state, nodes)
            quarantine.leave(state, nodes)
            devices.release(state, nodes, event.by)
        case DevicesKnown():
            devices.know(state, event)
        case DeviceJudged():
            devices.judged(state, event)
        case _:
            pass


def _hear(state: RunState, event: Telemetry) -> None:
    heard = event.heard
    if heard != state.hearing.chorus and not state.nodes.keys() >= set(heard):
        heard = tuple(node for node in heard if node in state.nodes)
    state.hearing.hear_all(heard, state.now)


def _take_over(state: RunState, started: ControllerStarted) -> None:
    state.incarnation, state.took_over_at = started.incarnation, state.now
    # Every connection died with the predecessor; agents come back by themselves.
    for known in state.nodes.values():
        known.connected = False
        state.weigh(known)


def _join(state: RunState, node_id: NodeId, joined: Joined) -> None:
    node = state.nodes.get(node_id)
    if node is None:
        node = Node(node_id, joined.incarnation, joined_at=state.now, here_since=state.now)
        state.know(node)
    seated = node_id in state.seated and not state.wanting
    was_lost = bool(node.lost)
    if joined.incarnation > node.incarnation:
        node.here_since = state.now
        copies.hold_only(state, node_id, ())
        node.lost = node.unusable = ""
        if seated:
            # Even if it never said that it took this generation up: its ranks may have been seen
            # by others, and nobody gets one seat twice.
            node.reborn = f"{node_id} came back as incarnation {joined.incarnation}: its ranks died"
            state.reborn.add(node_id)
            node.died_after = state.hearing.spoke_at(node_id)
        node.incarnation = joined.incarnation
    elif node.lost and not seated:
        # The very process that was given up for lost is back, for example after a partition.
        node.lost = ""
    if was_lost and not node.lost:
        state.absences_s.append(state.now - node.lost_at)
    node.connected = True
    state.weigh(node)
    state.hearing.hear(node_id, state.now)
    node.generation, node.mark = joined.generation, joined.mark
    node.finished = joined.mark == len(MARKS) - 1
    marks.moved(state, node)
    copies.hold(state, node_id, copies.of_this_lineage(state, joined))
    if joined.generation == state.generation:
        state.lanes.update(zip(joined.ranks, joined.lanes, strict=False))
    devices.join(state, node, joined)


def _compare(state: RunState, fact: StateDiverged | DetectorFailed) -> None:
    if isinstance(fact, StateDiverged):
        quarantine.diverge(state, fact, Proof.VOTE)
    else:
        state.detectors_off.setdefault(fact.detector, fact)


def _take(  # noqa: C901, PLR0912, PLR0915 - one line per fact
    state: RunState, node: Node, fact: Fact
) -> None:
    """Apply a fact of the current generation; drop one of an older."""
    if isinstance(fact, NodeUnusable):
        devices.break_down(state, node, fact)
        node.unusable = fact.reason
        state.weigh(node)
        return
    if isinstance(fact, NodeAiling):
        symptoms.take(state, node, fact)
        return
    if isinstance(fact, StateDiverged):
        # Also one of an older generation: this one may continue what it is about.
        quarantine.diverge(state, fact, Proof.REPLAY)
        return
    if isinstance(fact, StacksTaken):
        inspection.take(state, node.id, fact)
        return
    if isinstance(fact, Preflighted):
        devices.answer(state, node, fact)
        return
    generation = getattr(fact, "generation", state.generation)
    if generation != state.generation:
        _take_late(state, node, fact)
        return
    match fact:
        case LinkTimed():
            _time_link(state, node, fact)
        case Reached(mark=mark):
            _reach(node, generation, mark)
            marks.moved(state, node)
        case Prepared(step=step, reads=reads):
            _count_reads(state, f"{node.id} in generation {generation}", reads)
            copies.hold_verified(state, (node.id,), step)
            copies.find_bad(state, fact)
        case PreparationFailed():
            _fail_preparation(state, node.id, fact)
        case RankExited():
            if node.id in state.seated and _news(state, fact):
                state.exits.append(fact)
                state.exited_at.append(state.now)
        case RanksTroubled(message=message):
            state.troubled.setdefault(node.id, (state.now, message))
        case ShardsHeld(holdings=holdings, renewed=renewed):
            copies.hold_only(state, node.id, holdings, renewed)
        case ShardsWritten(step=step):
            if step not in state.committing and not state.committed(step):
                state.written.setdefault(step, {})[node.id] = fact
        case ShardsStaged():
            durable.take_votes(state, node.id, fact)
        case WriteFailed(step=step, reason=reason):
            # What other nodes wrote of the step stays: this one tries again.
            state.save_failures.append((state.now, step, f"{node.id}: {reason}"))
        case DetectorFailed(detector=detector):
            state.detectors_off.setdefault(detector, fact)
        case StateRepaired():
            repairs.take(state, fact)
        case RankProbed():
            slowness.answer(state, fact)
        case FaultCarriedOut(index=index):
            state.carried_out.add(index)
        case RanksFinished(ranks=ranks, lanes=lanes):
            state.lanes.update(zip(ranks, lanes, strict=True))
            node.finished = True
            node.generation, node.mark = generation, len(MARKS) - 1
            marks.moved(state, node)
        case _:
            pass


def _fail_preparation(state: RunState, node: NodeId, fact: PreparationFailed) -> None:
    state.failed_preparation = f"{node}: {fact.reason}"
    if fact.tier == "durable":
        durable.pass_over(state, fact.step, fact.reason)
    else:
        copies.strike(state, node, fact)


def _take_together(
    state: RunState,
    names: tuple[NodeId, ...],
    fact: Reached | Prepared | RanksTroubled | ShardsWritten,
) -> None:
    """Apply one fact that many nodes report."""
    if not names and fact.generation != state.generation:
        return
    known = state.nodes
    # Whoever has a seat is known: of thousands, nobody need be looked up for that.
    who = [name for name in names if name in known] if names else list(state.seated)
    state.hearing.hear_many(who, state.now)
    if not who or fact.generation != state.generation:
        return
    match fact:
        case Reached(mark=mark):
            generation = fact.generation
            for node in map(known.__getitem__, who):
                if node.generation == generation and node.mark < mark:
                    node.mark = mark
                elif node.generation != generation:
                    node.generation, node.mark = generation, mark
            marks.find_lowest(state)
        case Prepared(step=step, reads=reads):
            _count_reads(
                state, f"{len(who)} nodes in generation {fact.generation}", reads * len(who)
            )
            copies.hold_verified(state, who, step)
        case RanksTroubled():
            said = dict.fromkeys(who, (state.now, fact.message))
            state.troubled = said | state.troubled
        case ShardsWritten():
            # All receipts are in one of them: whoever wrote a shard, it is there.
            _take(state, known[who[0]], fact)


def _reach(node: Node, generation: Generation, mark: int) -> None:
    node.mark = max(node.mark, mark) if node.generation == generation else mark
    node.generation = generation


def _count_reads(state: RunState, who: str, reads: int) -> None:
    """Enter how often the durable tier was asked, of all that led to the present generation."""
    for incident in (i for i in state.incidents if i.restarted_as == state.generation):
        # Entered, not added: agents say it again when they reconnect.
        incident.reads[who] = reads


def _take_late(state: RunState, node: Node, fact: Fact) -> None:
    """Take from a fact of another generation what is true in this one as well."""
    if isinstance(fact, RankExited):
        # Changes nothing but what is known of the incident that it belongs to.
        _exit_late(state, node.id, fact)
    elif isinstance(fact, PreparationFailed) and fact.tier == "memory":
        copies.strike_late(state, node.id, fact)
    elif isinstance(fact, Prepared):
        copies.find_bad(state, fact)


def _exit_late(state: RunState, node: NodeId, fact: RankExited) -> None:
    if _news(state, fact):
        state.late_exits.append((state.now, node, fact))


def _news(state: RunState, fact: RankExited) -> bool:
    """Enter an exit as known; return whether it was not."""
    key = (fact.generation, fact.rank, fact.pid)
    known = key in state.exits_known
    state.exits_known.add(key)
    return not known


def _time_link(state: RunState, node: Node, fact: LinkTimed) -> None:
    """Take in how fast a way is; what no agent of ours says must not fill the memory."""
    if node.id in state.seated and fact.to in state.nodes and fact.bytes_per_s > 0:
        training = state.phase is RunPhase.TRAINING
        state.ways.hear((node.id, fact.to), fact.bytes_per_s, state.now, training=training)


def give_up(state: RunState, node: NodeId, evidence: str) -> None:
    """Take a node for lost until it joins again: what it ran and what it held."""
    if not state.nodes[node].lost:
        state.nodes[node].lost_at = state.now
    state.nodes[node].lost = evidence
    state.weigh(state.nodes[node])
    copies.forget(state, node)


def disconnect_silent(state: RunState) -> list[NodeId]:
    """Count on no connection on which nothing is heard, however open it looks.

    Returns:
        Whose it was. A node says that it is there again only on a new one, so close the old one.
    """
    silent = [
        node for name in state.hearing.silent(state.now) if (node := state.nodes[name]).connected
    ]
    for node in silent:
        node.connected = False
        state.weigh(node)
    return sorted(node.id for node in silent)


def reset_for_generation(
    state: RunState,
    seats: tuple[NodeId, ...],
    buddies: dict[NodeId, NodeId],
    restore: RestoreFrom | None,
) -> None:
    """Forget what was known of the ranks of the old generation; keep what outlives it."""
    restored = restore.step if restore else Step(0)
    # A checkpoint may be of another lineage than what memory has, even of the same step.
    kept = restore.step if restore and not restore.commit else Step(-1)
    state.seat(seats, buddies)
    state.ways = state.ways.renewed(len(seats))
    for network in state.slow_networks.values():
        network.left = network.left or network.node not in state.seated
    state.exits, state.exited_at, state.late_exits, state.troubled = [], [], [], {}
    state.exits_known = set()
    state.failed_preparation = ""
    state.repairing = None
    state.diverged, state.suspects = [], []
    state.watched_to = restored
    state.offered = ""
    state.lanes = {}
    # A commit that is under way may still succeed; nobody waits for it any more.
    state.written, state.committing, state.commit_at, state.votes = {}, {}, {}, {}
    state.start_step = state.reached_step = restored
    heritage.continue_from(state, restore)
    vouching.continue_from(state, restore)
    state.kept[state.generation] = kept
    state.reborn = set()
    for node in state.nodes.values():
        node.finished = False
        node.reborn = ""
        node.mark = 0
    state.holdings.drop(step for step in state.holdings if step > kept)
    state.retained = Step(min(state.retained, restored))
    copies.forget_beyond(state, kept)


def since_last_progress(state: RunState) -> Seconds:
    """Return the moment of the last completed step, or of the generation's start."""
    newest = state.step_log[-1][1] if state.step_log else Seconds(0.0)
    training = state.phase in (RunPhase.TRAINING, RunPhase.FINISHING)
    return Seconds(max(newest, state.phase_since)) if training else state.phase_since
