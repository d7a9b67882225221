"""Everything the controller knows. Plain data; only `Controller.handle` changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestrator.core.decisions import Decision, JudgeDevice
from orchestrator.core.events import CheckpointFound, DeviceKnown
from orchestrator.core.experience import Experience
from orchestrator.core.fleet import Fleet, StepTimes
from orchestrator.core.hearing import Hearing
from orchestrator.core.holdings import Copies, Holdings, Share
from orchestrator.core.incident import Finding, Incident, Likeness
from orchestrator.core.ledger import Ledger
from orchestrator.core.paces import Paces
from orchestrator.core.phases import RunPhase
from orchestrator.core.records import (
    Budget,
    Committed,
    Drain,
    Node,
    Occurrence,
    Quarantined,
    Repair,
    Resize,
    Slow,
    SlowNetwork,
)
from orchestrator.core.trust import Onset, Verdict, trusted
from orchestrator.core.ways import Ways
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import (
    Generation,
    IncidentId,
    NodeId,
    Rank,
    Seconds,
    Serial,
    Step,
)
from orchestrator.protocol.messages import (
    Ancestor,
    DetectorFailed,
    FailedCopy,
    Impression,
    RankExited,
    ShardsWritten,
    StateDiverged,
)
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.seats import ranks_by_node
from orchestrator.protocol.timeouts import Timeouts

D = TypeVar("D", bound=Decision)
STEP_LOG_LENGTH = 200_000
ABSENCES_MAX = 32
PHASES_MAX = 10_000
"""Phases that are remembered: those of more than a thousand restarts."""
COMMITS_MAX = 1000
"""Checkpoints that are remembered: older ones were deleted (spec.checkpoint.keepLast)."""


@dataclass(slots=True)
class RunState:
    """One run, as its controller knows it."""

    run: TrainingRun
    timeouts: Timeouts
    now: Seconds = Seconds(0.0)
    phase: RunPhase = RunPhase.GATHERING
    phase_since: Seconds = Seconds(0.0)
    phases: list[tuple[Seconds, RunPhase]] = field(
        default_factory=lambda: [(Seconds(0.0), RunPhase.GATHERING)]
    )
    """Every phase, the last PHASES_MAX of them, and since when; none that was over at once."""
    incarnation: int = 0
    """Controllers that this run has had."""
    took_over_at: Seconds = Seconds(0.0)
    """When the present one began."""
    generation: Generation = Generation(0)
    seats: tuple[NodeId, ...] = ()
    """Node of each rank of the current world."""
    seated: dict[NodeId, tuple[Rank, ...]] = field(default_factory=dict)
    """Ranks of each node of the current world, in rank order."""
    buddies: dict[NodeId, NodeId] = field(default_factory=dict)
    """Where each of them copies what its ranks stage."""
    absences_s: deque[float] = field(default_factory=lambda: deque(maxlen=ABSENCES_MAX))
    """For how long nodes were lost that came back, the newest ones."""
    resizes: list[Resize] = field(default_factory=list)
    """When the number of replicas changed, oldest first."""
    staged: Copies = field(default_factory=lambda: Copies(0))
    """What they hold of a step when every rank has staged it."""
    copied: Copies = field(default_factory=lambda: Copies(0))
    """What is held of it when their buddies have it, too."""
    lowest_mark: int = 0
    """How far the least advanced of them has come in this generation."""
    behind: set[NodeId] = field(default_factory=set)
    """Those that are no further."""
    nodes: dict[NodeId, Node] = field(default_factory=dict)
    """All that ever joined; kept up by `know`."""
    seatless: set[NodeId] = field(default_factory=set)
    """Those without a seat in the current world."""
    unfit: set[NodeId] = field(default_factory=set)
    """Those on which no generation may be started; kept up by `weigh`."""
    reborn: set[NodeId] = field(default_factory=set)
    """Those that are here, and what they ran in this generation is gone."""
    hearing: Hearing = field(init=False)
    fleet: Fleet = field(default_factory=lambda: Fleet(0, Seconds(0.0)))
    paces: Paces = field(default_factory=lambda: Paces(0))
    """How long its ranks compute for the same work."""
    slow: dict[IncidentId, Slow] = field(default_factory=dict)
    """Ranks that were slower than their peers, by the incident that says so, the newest ones."""
    slow_unjudged: dict[IncidentId, Slow] = field(default_factory=dict)
    """Those of them of which nothing is known yet: looked through at every event."""
    slow_devices: dict[NodeId, Slow] = field(default_factory=dict)
    """The newest one of each node that was found to have a slow device."""
    ways: Ways = field(default_factory=Ways)
    """How fast the ways between its nodes are."""
    slow_networks: dict[NodeId, SlowNetwork] = field(default_factory=dict)
    """Nodes whose own network, or their buddy's, was found to be slow; the newest of each."""
    probes: int = 0
    """How often ranks were told to measure themselves."""
    step_times: StepTimes = field(default_factory=StepTimes)
    ledger: Ledger = field(default_factory=Ledger)
    incidents: list[Incident] = field(default_factory=list)
    _over: int = 0
    """How many of them are over, from the first one on without a gap."""
    named: dict[NodeId, dict[IncidentId, dict[Likeness, Finding]]] = field(default_factory=dict)
    """What each incident found about a node that was not cordoned; the first of what is alike."""
    ailed: dict[NodeId, list[Seconds]] = field(default_factory=dict)
    """When the hardware of nodes came to say that they are to be drained."""
    lost_in: dict[IncidentId, set[NodeId]] = field(default_factory=dict)
    """Nodes that each incident lost."""
    wanting: bool = True
    """Whether a new generation is needed and has not been ordered yet."""
    wanted_since: Seconds = Seconds(0.0)
    pause_until: Seconds | None = None
    """End of the back-off that was decided for the present need; None if none was."""
    found: CheckpointFound | None = None
    """Answer of the search for the present need, if it was asked."""
    search_failure: str = ""
    """Why the search for the present need got no answer; "" if it did or was not asked."""
    asked_at: Seconds | None = None
    """When the search was ordered that is not answered yet; None if none is under way."""
    searches: int = 0
    """How many were ordered; the number of the newest."""
    search_failures: int = 0
    """Searches in a row that got no answer."""
    search_again_at: Seconds | None = None
    """When to search again after one that got no answer; None if that can not help."""
    exits: list[RankExited] = field(default_factory=list)
    """Unexpected exits in the current generation."""
    exited_at: list[Seconds] = field(default_factory=list)
    late_exits: list[tuple[Seconds, NodeId, RankExited]] = field(default_factory=list)
    """Unexpected exits of older generations that were told after the current one was ordered."""
    exits_known: set[tuple[Generation, Rank, int]] = field(default_factory=set)
    """Generation, rank and pid of all of these: agents say it again when they reconnect."""
    troubled: dict[NodeId, tuple[Seconds, str]] = field(default_factory=dict)
    """Nodes whose collectives failed in this generation: since when, and the first message."""
    detectors_off: dict[str, DetectorFailed] = field(default_factory=dict)
    """By name, detectors that raised on ranks, or where what ranks say is compared: the first."""
    failed_preparation: str = ""
    """Why the state of the current generation could not be brought to its nodes."""
    condemned_memory: set[Step] = field(default_factory=set)
    """Steps from whose copies in memory nothing could be started, for whatever reason."""
    struck: dict[tuple[Step, NodeId, FailedCopy], Generation] = field(default_factory=dict)
    """Copies that were of no use: of which step, for which node; in which generation first."""
    bad_copies: dict[tuple[Step, NodeId, Rank], str] = field(default_factory=dict)
    """Copies that another node found not to be what was staged, with what it found: of which step,
    in whose memory, of which rank. "" of those that were replaced since, or are gone."""
    distrusted: dict[Step, set[Rank]] = field(default_factory=dict)
    """Whose state may have been wrong already when it was staged: after which step, of which
    ranks. Whoever holds a copy, it has the right checksums and the wrong numbers."""
    holdings: Holdings = field(init=False)
    retained: Step = Step(-1)
    cadence: Cadence = field(init=False)
    """How often the world saves."""
    cadence_begun: Cadence = field(init=False)
    """How often it did when the present generation began."""
    cadence_reason: str = ""
    """Why it was changed last; "" if it never was."""
    experience: Experience = field(default_factory=Experience)
    written: dict[Step, dict[NodeId, ShardsWritten]] = field(default_factory=dict)
    votes: dict[Step, dict[int, dict[NodeId, str]]] = field(default_factory=dict)
    """Content of each shard that is staged where it is not written, by node: replicas have it."""
    vouched: tuple[Step, dict[int, Impression]] | None = None
    """What the shards of the newest checkpoint look like, if its writers said so."""
    replicas_agreed: bool = False
    """Whether replicas were seen to have the same bytes: of a trainer whose never do, it says
    nothing that they have not."""
    judging: dict[tuple[Step, Generation, Verdict], str] = field(default_factory=dict)
    """Verdicts that were ordered and are not on record yet, and why."""
    replayed: Step = Step(0)
    """Newest step of the present generation in which every rank's last micro-batch came out the
    same elsewhere; 0 before the first."""
    rounds: int = 0
    """How many such steps were told of in this generation."""
    replays_vouch_for: Step = Step(0)
    """Up to here they do for the states of the present lineage; 0 for none."""
    committing: dict[Step, Generation] = field(default_factory=dict)
    commit_at: dict[Step, Seconds] = field(default_factory=dict)
    """Steps whose commit failed for a while: when it is tried again."""
    commits: list[Committed] = field(default_factory=list)
    """Checkpoints of the durable tier, the newest ones."""
    first_commit: Step | None = None
    """The earliest step that was ever committed, as far as is known; None for nothing at all."""
    from_seed: bool = False
    """Whether a generation of this life began from the seed: there is nothing older than that."""
    sound_commits: set[Step] = field(default_factory=set)
    """Their steps, but for those that were found bad."""
    save_failures: list[tuple[Seconds, Step, str]] = field(default_factory=list)
    offered: str = ""
    lanes: dict[Rank, tuple[int, int]] = field(default_factory=dict)
    best_step: Step = Step(0)
    """Furthest step ever completed."""
    sound_step: Step = Step(0)
    """The same, but for steps that a silent corruption came before: to do them again is new."""
    reached_step: Step = Step(0)
    """Last step completed in the current lineage."""
    start_step: Step = Step(0)
    """Step from which the current generation continued."""
    former_generation: Generation = Generation(0)
    """The newest generation of the former lives whose journals are here, 0 if there are none."""
    untold_step: Step = Step(0)
    """Up to here a life whose journal is not here computed the steps of the current lineage."""
    kept: dict[Generation, Step] = field(default_factory=dict)
    """Up to which step memory still counted when each generation began, -1 for not at all.

    What a node holds that has not heard of a generation counts up to its step only.
    """
    ancestors: tuple[Ancestor, ...] = ()
    """Older generations that the current one continues; see `core.lineage`."""
    step_log: deque[tuple[Step, Seconds]] = field(
        default_factory=lambda: deque(maxlen=STEP_LOG_LENGTH)
    )
    losses: dict[Step, float | None] = field(default_factory=dict)
    grad_norms: dict[Step, float | None] = field(default_factory=dict)
    digests: dict[Step, str] = field(default_factory=dict)
    """Of the state that each step began with, and of its gradient, as far as ranks compare them."""
    tokens_per_s: float = 0.0
    divergences: list[Step] = field(default_factory=list)
    """Steps whose loss came out differently when they were computed again."""
    digests_differ: list[Step] = field(default_factory=list)
    """The same of the bits of their state and gradient, which a loss seldom shows."""
    occurrences: dict[tuple[str, Step], Occurrence] = field(default_factory=dict)
    """Faults with a signature, by signature and step; the one that struck last is the last."""
    futile_restarts: int = 0
    """Restarts in a row after which the run got no further than `sound_step`."""
    budgets: dict[str, Budget] = field(default_factory=dict)
    refilled_at: Step = Step(0)
    unseen_s: float = 0.0
    """How long, of the present phase, nobody was looking; seconds."""
    way: str = ""
    """In which way the present generation came to be: what its phases take depends on it."""
    phase_times: dict[tuple[RunPhase, str], float] = field(default_factory=dict)
    """Longest time a phase has taken so far, in each way of coming back, seconds."""
    broken_off: dict[tuple[RunPhase, str], float] = field(default_factory=dict)
    """The same of those that were broken off since one came to its end."""
    end_state: str = ""
    end_reason: str = ""
    injected: dict[int, tuple[Seconds, str, str]] = field(default_factory=dict)
    """Faults of the harness that are on record: ground truth for reports, not for deciding."""
    carried_out: set[int] = field(default_factory=set)
    """Those of them that their agent has confirmed."""
    rungs: dict[str, int] = field(default_factory=dict)
    drains: dict[NodeId, Drain] = field(default_factory=dict)
    """Cordoned nodes, whether they have joined or not."""
    quarantined: dict[NodeId, Quarantined] = field(default_factory=dict)
    """Nodes that get no seat until they are uncordoned, and lose what they have."""
    onsets: list[Onset] = field(default_factory=list)
    """Silent corruptions: states that came after them are not trusted."""
    diverged: list[StateDiverged] = field(default_factory=list)
    """What the present generation has to be ended for."""
    suspects: list[NodeId] = field(default_factory=list)
    """Who is suspected of it, the most suspected first, and was not said to be well since."""
    repairs: list[Repair] = field(default_factory=list)
    """Ranks whose state was wrong and was given that of others, in this life."""
    repairing: Repair | None = None
    """What a rank of this generation is about to be given, as long as nothing more is told."""
    unrepaired: Repair | None = None
    """Why that was not done the last time that state differed."""
    divergences_told: list[StateDiverged] = field(default_factory=list)
    """All that was ever told of them: agents say it again when they reconnect."""
    devices: dict[Serial, DeviceKnown] = field(default_factory=dict)
    """Those against which the device ledger has something."""
    claimed: dict[Serial, NodeId] = field(default_factory=dict)
    """Who said last that it has a device."""
    ambiguous: set[Serial] = field(default_factory=set)
    """Devices that two nodes had at a time: nobody knows who it was, so nothing is held by them."""
    devices_problem: str = ""
    """Why that is not known, or not all of it; "" if it is."""
    judging_devices: dict[str, JudgeDevice] = field(default_factory=dict)
    """Verdicts about devices that were ordered and are not on record yet, by name, in order."""
    judged_devices: int = 0
    """How many were ordered in this life."""
    preflights: dict[NodeId, str] = field(default_factory=dict)
    """Nodes that were told to compute what is known beforehand, on the connection that they have:
    "" while they have not answered, else why nothing came of it."""
    unsaid_verdicts: list[str] = field(default_factory=list)
    """Those of them that the present event led to; none between events."""
    retesting: set[NodeId] = field(default_factory=set)
    """Nodes that are kept out for no more than devices that are to be tested."""
    watched: dict[Serial, int] = field(default_factory=dict)
    """Devices that something was found against: steps that they took since in this life, while
    replicas were compared, with nothing more."""
    watched_to: Step = Step(0)
    """Up to which step that is counted."""

    def __post_init__(self) -> None:
        self.holdings = Holdings(self.run.world_size)
        self.hearing = Hearing(self.timeouts.silence_s)
        self.cadence = self.cadence_begun = self.run.cadence

    @property
    def incident(self) -> Incident | None:
        """The newest incident that training has not recovered from."""
        # Not simply the last: a controller that dies in the middle of a recovery is an incident,
        # too, and is over at once.
        return next(reversed(self.open_incidents()), None)

    def open_incidents(self) -> list[Incident]:
        """Return the incidents that training has not recovered from, oldest first."""
        # None is opened again, and after months there are hundreds: asked for at every event.
        while self._over < len(self.incidents) and not self.incidents[self._over].open:
            self._over += 1
        return [incident for incident in self.incidents[self._over :] if incident.open]

    @property
    def replicas(self) -> int:
        """Replicas of the current world; 0 before the first."""
        return len(self.seats) // self.shard_count()

    @property
    def short(self) -> bool:
        """Whether the current world has fewer replicas than the run."""
        return 0 < len(self.seats) < self.run.world_size

    @property
    def shrunk_by(self) -> IncidentId | None:
        """What took the replicas that are missing; None if none are, or they never came."""
        if not self.short:
            return None
        # Not of those that are back: the newest that took the world from more than it has now.
        here = self.replicas
        return next(
            (r.incident for r in reversed(self.resizes) if r.after <= here < r.before), None
        )

    @property
    def world(self) -> tuple[NodeId, ...]:
        """The nodes of the current world, each once, in rank order."""
        return tuple(self.seated)

    def ranks_of(self, node: NodeId) -> tuple[Rank, ...]:
        """Return the ranks that have their seat on `node`."""
        return self.seated.get(node, ())

    def seat(self, seats: tuple[NodeId, ...], buddies: dict[NodeId, NodeId]) -> None:
        """Enter the world of a new generation, none of whose nodes has come anywhere yet."""
        self.lowest_mark, self.behind = 0, set(seats)
        if (seats, buddies) == (self.seats, self.buddies):
            return
        before, kept_by = self.seated, self.buddies
        self.seats, self.buddies = seats, buddies
        self.seated = ranks_by_node(seats)
        self.seatless = set(self.nodes.keys() - self.seated.keys())
        names = dict(zip(before, self.seated, strict=False))
        if list(before.values()) == list(self.seated.values()) and buddies == {
            names[node]: names.get(buddy) for node, buddy in kept_by.items()
        }:
            # A node in place of another, and nothing else has changed.
            self.staged, self.copied = self.staged.renamed(names), self.copied.renamed(names)
            return
        own: dict[NodeId, Share] = {n: frozenset(ranks) for n, ranks in self.seated.items()}
        both = dict(own)
        for node, buddy in buddies.items():
            both[buddy] = both.get(buddy, frozenset()) | own[node]
        # Of the full world, whatever is left of it: a rank's number says which shard it has.
        full = self.run.world_size
        self.staged, self.copied = Copies(full, own), Copies(full, both)

    def spares(self) -> tuple[NodeId, ...]:
        """Return the usable nodes without a seat that are not cordoned or quarantined, sorted."""
        free = self.seatless - self.unfit
        return tuple(sorted(free - self.drains.keys() - self.quarantined.keys()))

    def know(self, node: Node) -> None:
        """Enter a node that has joined for the first time: it has no seat yet."""
        self.nodes[node.id] = node
        self.seatless.add(node.id)

    def weigh(self, node: Node) -> None:
        """Keep up whether a generation may be started on a node, after anything that decides it."""
        if node.usable:
            self.unfit.discard(node.id)
        else:
            self.unfit.add(node.id)

    def drained(self, node: NodeId) -> bool:
        """Whether a node is cordoned and runs nothing: then nothing is put there any more.

        It has no seat, or it was taken while it had one, and another agent is there now.
        """
        drain = self.drains.get(node)
        if drain is None:
            return False
        return node not in self.seated or self.nodes[node].incarnation > drain.incarnation

    def cordoned(self) -> set[NodeId]:
        """Return the drained nodes, and those that are quarantined."""
        return {node for node in self.drains if self.drained(node)} | self.quarantined.keys()

    def holders(self, step: Step, rank: Rank) -> tuple[NodeId, ...]:
        """Return the nodes from whose memory this shard can be fetched, sorted."""
        return tuple(n for n in self.holdings.of(step).holders(rank) if self.nodes[n].serves)

    def know_commits(self, commits: Iterable[Committed]) -> None:
        """Enter checkpoints that are durable; forget those that were deleted long ago."""
        new = list(commits)[-COMMITS_MAX:]
        earliest = [one.step for one in new]
        if self.first_commit is not None:
            earliest.append(self.first_commit)
        self.first_commit = min(earliest, default=None)
        known = [*self.commits, *new]
        forgotten, self.commits = known[:-COMMITS_MAX], known[-COMMITS_MAX:]
        # Only what changes is judged: there is another one every few minutes, for months.
        gone = {one.step for one in forgotten}
        again = [*new, *(one for one in self.commits if one.step in gone)] if gone else new
        self.sound_commits -= gone
        self.sound_commits |= self._sound_among(again)

    def judge_commits(self) -> None:
        """Keep up which of them nobody found bad, and are of a state that is trusted."""
        self.sound_commits = self._sound_among(self.commits)

    def _sound_among(self, commits: Iterable[Committed]) -> set[Step]:
        return {
            known.step
            for known in commits
            if not known.rejected and trusted(self.onsets, known.step, known.epoch)
        }

    def committed(self, step: Step) -> bool:
        """Whether the durable tier has a checkpoint of this step that nobody found bad."""
        return step in self.sound_commits

    def shard_count(self) -> int:
        """Return how many different shards the state of the world has: replicas share theirs."""
        return self.run.shard_count

    def shard_of(self, rank: Rank) -> int:
        """Return the durable shard of a rank, of a world of any number of replicas.

        With pipelines a world has all of them: a stage's ranks come after all replicas' of the one
        before, so that their numbers depend on how many those are.
        """
        return self.run.layout.shard_of(rank)


def decide(state: RunState, kind: type[D], reason: str, /, **fields: Any) -> D:  # noqa: ANN401
    """Return a decision of the present generation, taken for the incident that is open, if any."""
    incident = state.incident
    return kind(
        generation=state.generation,
        reason=reason,
        incident=incident.id if incident else None,
        **fields,
    )
