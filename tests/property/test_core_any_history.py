"""Whatever happens in whatever order: the state stays sound, and the journal replays."""

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import journal
from orchestrator.core.controller import BLIND_BEATS
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import (
    CheckpointCommitted,
    CommitFailed,
    ControllerStarted,
    DrainCancelled,
    DrainRequested,
    NodeDisconnected,
    StopRequested,
)
from orchestrator.core.ledger import Bucket, Ledger
from orchestrator.core.marks import world_mark
from orchestrator.core.phases import RunPhase
from orchestrator.protocol import messages
from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Rank, Seconds, Serial, Step
from orchestrator.protocol.messages import (
    FailedCopy,
    NodeAiling,
    NodeUnusable,
    PreparationFailed,
    RanksTroubled,
    Receipt,
    RendezvousOffered,
    ShardsWritten,
    StateDiverged,
    Symptom,
)
from tests.conftest import Cluster

NODES = st.sampled_from(["node-0", "node-1", "node-2"])
MARKS = st.sampled_from(["cleared", "seated", "formed", "restored", "stepped"])
COPIES = st.builds(
    FailedCopy,
    NODES,
    st.integers(0, 3),
    st.sampled_from(["corrupt", "absent", "unreachable", "no-room"]),
)
ACTIONS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0.01, 30)),
    st.tuples(st.just("exit"), st.integers(0, 3), st.sampled_from([-9, -11, -15, 1, 0, 78])),
    st.tuples(st.just("raise"), st.integers(0, 3)),
    st.tuples(st.just("lose"), NODES),
    st.tuples(st.just("disconnect"), NODES),
    st.tuples(st.just("join"), NODES, st.integers(1, 3), st.integers(0, 6)),
    st.tuples(st.just("reach"), MARKS),
    st.tuples(st.just("hold"), st.integers(0, 30)),
    st.tuples(st.just("train"), st.integers(1, 5)),
    st.tuples(st.just("freeze"), st.integers(0, 3)),
    st.tuples(st.just("found"), st.none() | st.integers(0, 30)),
    st.tuples(st.just("trouble"), NODES),
    st.tuples(st.just("unreadable"), NODES, st.lists(COPIES, max_size=2)),
    st.tuples(st.just("unusable"), NODES),
    st.tuples(st.just("offer"), NODES),
    st.tuples(st.just("commit"), st.integers(0, 30)),
    st.tuples(st.just("commit-failed"), st.integers(0, 30), st.booleans()),
    st.tuples(st.just("written"), NODES, st.integers(0, 3), st.sets(st.integers(0, 1))),
    st.tuples(st.just("successor"), st.integers(2, 5)),
    st.tuples(st.just("outage"), st.floats(1, 2000)),
    st.tuples(st.just("silent"), NODES, st.integers(1, 80)),
    st.tuples(st.just("drain"), NODES, st.none() | st.floats(0, 100)),
    st.tuples(st.just("uncordon"), NODES),
    st.tuples(st.just("ail"), NODES, st.dictionaries(st.sampled_from("ab"), st.booleans())),
    st.tuples(
        st.just("diverge"),
        st.none() | st.integers(0, 30),
        st.lists(NODES, max_size=3, unique=True),
        st.booleans(),
        st.integers(0, 1),
    ),
)


def act(cluster: Any, action: tuple[Any, ...]) -> None:  # noqa: C901, PLR0912, PLR0915 - a table
    state = cluster.state
    generation = state.generation
    if state.phase.final:
        return
    match action:
        case ("wait", seconds):
            cluster.after(seconds).tick()
        case ("exit", rank, code) if state.seats:
            cluster.exit(rank, code, step=state.reached_step)
        case ("raise", rank) if state.seats:
            cluster.exit(rank, 1, step=state.reached_step, kind="ValueError")
        case ("lose", node):
            cluster.lose(node)
        case ("disconnect", node):
            cluster.tell(NodeDisconnected(at=cluster.at(), node=NodeId(node)))
        case ("join", node, incarnation, mark):
            cluster.join(node, incarnation=incarnation, generation=generation, mark=mark)
        case ("reach", mark) if state.seats:
            cluster.reach(mark)
        case ("hold", step) if state.seats:
            cluster.hold(step)
        case ("train", steps) if state.seats:
            cluster.train(steps)
        case ("freeze", rank) if state.seats:
            states = "".join("T" if r == rank else "S" for r in range(4))
            for _ in range(8):
                cluster.after(1).beat(
                    step=state.reached_step, moving=lambda _: False, states=states
                )
        case ("found", step) if state.phase is RunPhase.SEARCHING:
            cluster.found(step)
        case ("trouble", node) if node in state.nodes:
            fact = RanksTroubled(generation=generation, ranks=(Rank(0),), message="reset")
            cluster.say(node, fact)
        case ("unreadable", node, copies) if node in state.nodes:
            cluster.say(
                node,
                PreparationFailed(
                    generation=generation,
                    step=state.start_step,
                    tier="memory",
                    reason="torn",
                    copies=tuple(copies),
                ),
            )
        case ("unusable", node) if node in state.nodes:
            cluster.say(node, NodeUnusable(reason=f"{node}: pid 1 survived SIGKILL"))
        case ("offer", node) if node in state.nodes:
            cluster.say(node, RendezvousOffered(generation=generation, address="127.0.0.1:9"))
        case ("commit", step):
            key = f"commits/{step}"
            cluster.tell(
                CheckpointCommitted(at=cluster.at(), step=Step(step), epoch=generation, key=key)
            )
        case ("commit-failed", step, again):
            # One that is under way, if there is any: of others nothing is made.
            failed = Step(max(state.committing, default=step))
            cluster.tell(
                CommitFailed(
                    at=cluster.at(), step=failed, epoch=generation, reason="full", again=again
                )
            )
        case ("written", node, step, shards) if node in state.nodes:
            receipts = tuple(Receipt(shard, 10, "d") for shard in sorted(shards))
            cluster.say(
                node,
                ShardsWritten(generation=generation, step=Step(step), receipts=receipts, model="m"),
            )
        case ("successor", incarnation):
            cluster.tell(ControllerStarted(at=cluster.at(), incarnation=incarnation))
        case ("outage", seconds):
            incarnation = state.incarnation + 1
            cluster.after(seconds).tell(ControllerStarted(at=cluster.at(), incarnation=incarnation))
        case ("drain", node, within_s):
            cluster.tell(
                DrainRequested(at=cluster.at(), nodes=(NodeId(node),), by="ann", within_s=within_s)
            )
        case ("uncordon", node):
            cluster.tell(DrainCancelled(at=cluster.at(), nodes=(NodeId(node),), by="ann"))
        case ("ail", node, told) if node in state.nodes:
            symptoms = tuple(
                Symptom(name=name, device="x", serial=Serial(""), drain=drain, words=name)
                for name, drain in sorted(told.items())
            )
            cluster.say(node, NodeAiling(symptoms=symptoms))
        case ("diverge", since, nodes, proven, ago) if "node-0" in state.nodes:
            cluster.say(
                "node-0",
                StateDiverged(
                    generation=Generation(generation - ago),
                    step=state.reached_step,
                    since=since,
                    nodes=tuple(map(NodeId, nodes)),
                    evidence="digests differ",
                    proven=proven,
                ),
            )
        case ("silent", node, seconds):
            # Its connection stays open, for all that anybody can see.
            for _ in range(seconds):
                heard = tuple(name for name in connected(cluster) if name != node)
                cluster.after(1).beat(step=state.reached_step, heard=heard)
        case _:
            pass


@given(st.lists(ACTIONS, max_size=40), st.booleans())
def test_any_history_keeps_every_invariant_and_replays_byte_for_byte(
    actions: list[Any],
    begin: bool,  # noqa: FBT001 - drawn, not passed by a reader
) -> None:
    cluster = Cluster()
    if begin:
        cluster.start()
    generations = [cluster.state.generation]
    for action in actions:
        act(cluster, action)
        generations.append(cluster.state.generation)
        out = cluster.state.quarantined
        lost = [n for n in cluster.state.world if cluster.state.nodes[n].unusable or n in out]
        assert not lost or cluster.state.wanting or cluster.state.phase.final
        limit_s = cluster.state.timeouts.silence_s
        nodes = cluster.state.nodes.values()
        assert not [
            n
            for n in nodes
            if n.connected and cluster.state.now - cluster.state.hearing.heard_at(n.id) > limit_s
        ]

    assert generations == sorted(generations)
    assert cluster.controller.disabled == {}
    fresh = Cluster()
    data = journal.line(journal.Header(run_id="r", run=cluster.run))
    data += b"".join(journal.line(entry) for entry in cluster.entries)
    assert journal.replay(fresh.controller, journal.read(data).entries) == []
    assert fresh.state.ledger.spans() == cluster.state.ledger.spans()


def connected(cluster: Cluster) -> tuple[str, ...]:
    return tuple(sorted(n.id for n in cluster.state.nodes.values() if n.connected))


def call_again(cluster: Cluster) -> None:
    """What agents do that are well: a new one where one ended, and a call where none is open."""
    cluster.after(0.1).beat(step=cluster.state.reached_step, heard=connected(cluster))
    for name in ("node-0", "node-1", "node-2"):
        node = cluster.state.nodes.get(NodeId(name))
        if cluster.state.phase.final:
            return
        if node is None or node.unusable or node.lost.endswith(" ended"):
            cluster.after(0.1).join(name, incarnation=node.incarnation + 1 if node else 1)
        elif not node.connected:
            cluster.after(0.1).join(
                name, incarnation=node.incarnation, generation=node.generation, mark=node.mark
            )


def watched_s(cluster: Cluster) -> float:
    """How long a controller was looking since it last started a generation."""
    seconds = 0.0
    for before, entry in pairwise(cluster.entries):
        gap = entry.event.at - before.event.at
        if gap <= BLIND_BEATS * cluster.state.timeouts.beat_s:
            seconds += gap
        if any(isinstance(d, StartGeneration) for d in entry.decisions):
            seconds = 0.0
    return seconds


def assert_ended_for_a_reason(cluster: Cluster) -> None:
    reason = cluster.state.end_reason
    if "after waiting 60 s" in reason:
        assert watched_s(cluster) >= 60
    else:
        # The last if a search that was drawn says that nothing is left of what was committed.
        poisoned = ("the fault moves with the job", "no other node was free to try it on")
        corrupted = ("nobody stands out who could be taken out", "none can be trusted")
        good = (*poisoned, *corrupted, "budget spent", "refused", "is the volume mounted")
        assert any(words in reason for words in good), reason


@given(st.lists(ACTIONS, max_size=25))
def test_after_any_history_a_cluster_that_is_well_again_trains_or_has_ended_for_a_reason(
    actions: list[Any],
) -> None:
    cluster = Cluster()
    cluster.start()
    for action in actions:
        act(cluster, action)
    if not cluster.state.phase.final:
        cordoned = tuple(sorted({*cluster.state.drains, *cluster.state.quarantined}))
        cluster.tell(DrainCancelled(at=cluster.at(), nodes=cordoned, by="ann"))

    for _ in range(12):
        if cluster.state.phase is RunPhase.TRAINING or cluster.state.phase.final:
            break
        call_again(cluster)
        if cluster.state.phase is RunPhase.SEARCHING:
            cluster.after(0.1).found(max(cluster.state.sound_commits, default=None))
        if cluster.state.phase is RunPhase.BACKING_OFF:
            cluster.after(60).tick()
        if not cluster.state.wanting and not cluster.state.phase.final:
            cluster.after(0.1).reach("stepped")

    if cluster.state.phase.final:
        assert_ended_for_a_reason(cluster)
    else:
        assert cluster.state.phase is RunPhase.TRAINING


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["train", "crash", "mark", "mark"])),
            st.tuples(st.sampled_from(["outage", "pause"]), st.floats(4, 2000)),
        ),
        max_size=25,
    )
)
def test_an_outage_is_never_taken_for_a_fault_and_no_run_ends_for_it(actions: list[Any]) -> None:
    cluster = Cluster()
    cluster.start()
    state = cluster.state
    for action in actions:
        match action:
            case ("train",) if state.phase is RunPhase.TRAINING:
                cluster.train(3)
                cluster.hold(state.reached_step)
            case ("crash",) if state.phase is RunPhase.TRAINING:
                cluster.after(0.1).exit(1, step=state.reached_step)
            case ("mark",) if state.phase is not RunPhase.TRAINING:
                cluster.after(0.1).reach(messages.MARKS[world_mark(state) + 1])
            case ("outage", seconds):
                incarnation = state.incarnation + 1
                cluster.after(seconds).tell(
                    ControllerStarted(at=cluster.at(), incarnation=incarnation)
                )
                cluster.after(0.1).tick()
                call_again(cluster)
            case ("pause", seconds):
                cluster.after(seconds).tick()
            case _:
                pass
        if state.phase.final:
            break

    assert {i.kind for i in state.incidents} <= {"crash", "controller-restart"}
    assert not state.phase.final or "budget spent" in state.end_reason


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100, allow_nan=False),
            st.sampled_from(list(Bucket)),
            st.floats(0, 200),
            st.floats(0, 200),
            st.sampled_from(list(Bucket)),
        ),
        max_size=30,
    )
)
def test_ledger_buckets_sum_to_the_wall_clock_exactly(entries: list[Any]) -> None:
    ledger = Ledger()
    now = 0.0
    for seconds, bucket, start, end, target in entries:
        now += seconds
        ledger.charge(Seconds(now), bucket, None)
        before = ledger.totals()
        moved = ledger.relabel(Seconds(start), Seconds(end), target, IncidentId("inc-1"))
        if target is not Bucket.EFFECTIVE:
            assert before[Bucket.EFFECTIVE] - ledger.totals()[Bucket.EFFECTIVE] == moved

    assert sum(ledger.totals().values()) == ledger.end_us == round(now * 1e6)
    starts = [span.start_us for span in ledger.spans()]
    assert starts == sorted(set(starts))


@given(st.binary(max_size=200), st.integers(0, 5000))
def test_a_torn_journal_loses_its_last_line_only(garbage: bytes, cut: int) -> None:
    cluster = Cluster()
    cluster.start()
    lines = [journal.line(journal.Header(run_id="r", run=cluster.run))]
    lines += [journal.line(entry) for entry in cluster.entries]
    whole = b"".join(lines[:-1])
    torn = lines[-1][: cut % len(lines[-1])]

    read = journal.read(whole + torn)

    assert len(read.entries) == len(cluster.entries) - 1
    assert read.good_bytes == len(whole)
    assert bool(read.torn) == bool(torn)
    if garbage and not garbage.endswith(b"\n") and b"\n" not in garbage:
        assert len(journal.read(whole + garbage).entries) == len(cluster.entries) - 1


def test_a_stop_is_final_whatever_comes_after() -> None:
    cluster = Cluster()
    cluster.start()
    cluster.tell(StopRequested(at=cluster.at(), by="test"))

    assert cluster.exit(1) == []
    assert cluster.state.generation == Generation(1)
