"""Draws worlds, runs, timings and faults by seed, and looks for what the controller gets wrong.

Each seed has its own mix, so that what one hides another shows. First faults rage, and nothing
illegal may happen (safety); then they stop, and the run must come to its end (liveness).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from orchestrator import compose
from orchestrator.core.journal import Entry
from orchestrator.core.phases import RunPhase
from orchestrator.core.report import report
from orchestrator.faults.plan import Fault, FaultPlan
from orchestrator.policy.switches import SWITCHABLE, without
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.runfile import TrainingRun, seconds
from orchestrator.simulation import story
from orchestrator.simulation.checkers import Invariants, Liveness, Redelivery
from orchestrator.simulation.drive import Dying, Simulation
from orchestrator.worlds.simulated.corruption import Habit
from orchestrator.worlds.simulated.profile import Constant, Profile
from orchestrator.worlds.simulated.wire import Wire
from orchestrator.worlds.simulated.world import SimulatedWorld

RAGE_S = (30.0, 600.0)
REPAIR_S = 30.0
TWICE_RATE = 0.01
"""Share of the reports that are told twice."""
PATIENCE = 40.0
"""How many times the longest limit of a run a world without faults may take to its end."""
RESTARTS_MAX = 100
"""Generations that begin in one after the last fault: of ten thousand drawn, none needed 50."""
OFF_SHARE = 0.1
"""Of the worlds in which a policy that can be switched off is."""
SHRINK_SHARE = 0.7
"""Of the worlds that may go on with fewer replicas, if they have several."""
BACK_SHARE = 0.8
"""Of the nodes that such a world loses in addition, and that come back by themselves."""
UNRULY = (0.0, 0.0, 0.0, 0.02, 0.1, 0.5)
"""Shares of messages with which something is wrong, one of which is drawn."""
LATE_S = (0.01, 10.0)
"""Between which they are late on average."""
_KINDS = (
    "kill-rank", "exit-rank", "segfault-rank", "freeze-rank", "spin-rank", "slow-rank",
    "kill-agent", "lose-node", "partition-node", "kill-controller", "corrupt-shard",
    "full-disk", "slow-disk",
)  # fmt: skip


class DrawnDrain(NamedTuple):
    """Nodes that are to be free for a while. Moments and spans are virtual seconds."""

    at: float
    nodes: tuple[NodeId, ...]
    within_s: float | None
    taken: bool
    """Whether they are taken once their time is up, whatever runs there."""
    back_at: float
    """When they may be used again."""


class DrawnCorruption(NamedTuple):
    """A node that computes wrong numbers for a while. Moments are virtual seconds."""

    at: float
    node: NodeId
    habit: Habit
    back_at: float
    """When it is sound, and may be used again."""


class Drawn(NamedTuple):
    """What a seed stands for."""

    run: TrainingRun
    plan: FaultPlan
    profile: Profile
    jitter: float
    death_rate: float
    cut_rate: float
    outages: tuple[tuple[float, float], ...]
    drains: tuple[DrawnDrain, ...]
    corruptions: tuple[DrawnCorruption, ...]
    rage_s: float
    unruly: float = 0.0
    """Share of the messages that are late, said twice, or lost with their connection."""
    late_s: float = 0.0
    """How late these are, on average."""


class Outcome(NamedTuple):
    """What became of one seed."""

    seed: int
    state: str
    reason: str
    generations: int
    controllers: int
    events: int
    virtual_s: float


class Broken(NamedTuple):
    """A seed in which something was not as it must be."""

    seed: int
    what: str


def attempt(seed: int) -> Outcome | Broken:
    """Run one seed; return what became of it, or what was wrong."""
    try:
        return conduct(seed)
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is looked for
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{at.filename.rpartition('orchestrator/')[2]}:{at.lineno}"
        what = str(error) if isinstance(error, AssertionError) else repr(error)
        return Broken(seed, f"{what} ({where})")


def tell(seed: int) -> Iterator[str]:
    """Run one seed; yield its events and decisions, and at the end what became of it."""
    entries: list[Entry] = []
    result: Outcome | Broken
    try:
        result = conduct(seed, record=entries.append)
    except Exception as error:  # noqa: BLE001 - it is told
        result = Broken(seed, f"{type(error).__name__}: {error}")
    yield from story.lines(entries)
    yield str(result)


def draw(seed: int) -> Drawn:
    """Return the world of a seed."""
    chance = np.random.Generator(np.random.Philox(seed))
    run = _run(chance)
    rage_s = float(np.exp(chance.uniform(*np.log(RAGE_S))))
    names = [f"node-{i}" for i in range(run.spec.nodes.count + run.spec.nodes.spares)]
    some = chance.permutation(len(_KINDS))[: chance.integers(1, len(_KINDS) + 1)]
    kinds = [_KINDS[i] for i in sorted(some)]
    faults = [
        _fault(chance, kinds, run.world_size, names, rage_s)
        for _ in range(int(chance.integers(0, 13)))
    ]
    plan = msgspec.convert({"kind": "FaultPlan", "faults": faults}, FaultPlan)
    outages = tuple(
        (
            start := float(chance.uniform(0, rage_s)),
            min(start + float(chance.exponential(20)), rage_s),
        )
        for _ in range(int(chance.integers(0, 3)))
    )
    drawn = Drawn(
        run=run,
        plan=plan,
        profile=_profile(chance, run),
        jitter=float(chance.choice([0.0, 0.1, 1.0, 3.0])),
        death_rate=float(chance.choice([0.0, 0.0, 0.001, 0.01])),
        cut_rate=float(chance.choice([0.0, 0.0, 0.005, 0.02])),
        outages=outages,
        drains=tuple(_drain(chance, names, rage_s) for _ in range(int(chance.integers(0, 4)))),
        corruptions=tuple(
            _corruption(chance, names, rage_s) for _ in range(int(chance.choice([0, 0, 0, 1, 2])))
        ),
        rage_s=rage_s,
    )
    # From a stream of its own: the other draws of seeds that are known stay as they were.
    shrinking = np.random.Generator(np.random.Philox(seed + (3 << 40)))
    run = _shrinking(shrinking, run)
    if run.spec.recovery.min_replicas is not None:
        losses = _losses(shrinking, names, rage_s)
        drawn = drawn._replace(plan=msgspec.structs.replace(plan, faults=plan.faults + losses))
    off = [name for name in SWITCHABLE if chance.random() < OFF_SHARE]
    # Without it a rank that stands still is never found, as promised, and no run has to end.
    off = [name for name in off if name != "hang"]
    wire = np.random.Generator(np.random.Philox(seed + (4 << 40)))
    return drawn._replace(
        run=without(run, off),
        unruly=float(wire.choice(UNRULY)),
        late_s=float(np.exp(wire.uniform(*np.log(LATE_S)))),
    )


def _run(chance: np.random.Generator) -> TrainingRun:
    count = int(chance.integers(1, 6))
    per_node = int(chance.integers(1, 4))
    world = count * per_node
    replicas = int(chance.choice([d for d in range(1, world + 1) if world % d == 0]))
    memory_every = int(chance.integers(1, 9))
    patient = chance.random() < 0.7
    text: dict[str, Any] = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "swarm"},
        "spec": {
            "nodes": {
                "count": count,
                "ranksPerNode": per_node,
                "spares": int(chance.integers(0, 4)),
            },
            "parallelism": {"dpReplicate": replicas},
            "trainer": {"steps": int(chance.integers(5, 200)), "globalBatch": world},
            "checkpoint": {
                "everySteps": memory_every * int(chance.integers(1, 8)),
                "memoryEverySteps": memory_every,
                "keepLast": int(chance.integers(2, 5)),
            },
            "detection": {
                "detectWithin": f"{chance.choice([1, 2, 5, 10])}s",
                "warmupLimit": f"{chance.choice([30, 120, 600])}s",
            },
            "recovery": {
                "hardwareBudget": 1000 if patient else int(chance.integers(0, 9)),
                "softwareBudget": 1000 if patient else int(chance.integers(0, 9)),
                "spareWait": "20m" if patient else f"{chance.integers(1, 60)}s",
            },
        },
    }
    run = msgspec.convert(text, TrainingRun)
    compose.check(run, "the drawn run")
    return run


def _shrinking(chance: np.random.Generator, run: TrainingRun) -> TrainingRun:
    """Return a run that may go on with fewer replicas, mostly."""
    replicas = run.spec.parallelism.dp_replicate
    if chance.random() < SHRINK_SHARE:
        least = int(chance.integers(1, replicas + 1))
        recovery = msgspec.structs.replace(run.spec.recovery, min_replicas=least)
        spec = msgspec.structs.replace(run.spec, recovery=recovery)
        run = msgspec.structs.replace(run, spec=spec)
    return run


def _losses(chance: np.random.Generator, nodes: list[str], rage_s: float) -> tuple[Fault, ...]:
    """Return losses of nodes, most of which come back: more than there are spares, now and then."""
    faults = []
    for _ in range(int(chance.integers(0, len(nodes) + 1))):
        after_s = float(chance.uniform(0, rage_s))
        fault = {"fault": "lose-node", "when": {"after": f"{after_s:.3f}s"}}
        fault["node"] = str(chance.choice(nodes))
        if chance.random() < BACK_SHARE:
            fault["for"] = f"{min(float(chance.exponential(30)) + 0.05, rage_s):.3f}s"
        faults.append(msgspec.convert(fault, Fault))
    return tuple(faults)


def _fault(
    chance: np.random.Generator, kinds: list[str], ranks: int, nodes: list[str], rage_s: float
) -> dict[str, Any]:
    kind = str(chance.choice(kinds))
    fault: dict[str, Any] = {"fault": kind, "when": {"after": f"{chance.uniform(0, rage_s):.3f}s"}}
    if kind.endswith("-rank"):
        fault["rank"] = int(chance.integers(ranks))
    elif kind != "kill-controller":
        fault["node"] = str(chance.choice(nodes))
    lasts = f"{min(float(chance.exponential(15)) + 0.05, rage_s):.3f}s"
    if kind in ("partition-node", "full-disk", "slow-disk", "slow-rank") or (
        kind == "freeze-rank" and chance.random() < 0.5
    ):
        fault["for"] = lasts
    if kind == "slow-rank":
        fault["share"] = float(chance.uniform(0.2, 0.9))
    return fault


def _drain(chance: np.random.Generator, nodes: list[str], rage_s: float) -> DrawnDrain:
    at = float(chance.uniform(0, rage_s))
    within_s = float(chance.exponential(30)) if chance.random() < 0.5 else None
    several = chance.permutation(nodes)[: 1 + int(chance.integers(0, 2))]
    return DrawnDrain(
        at=at,
        nodes=tuple(NodeId(str(node)) for node in sorted(several)),
        within_s=within_s,
        taken=bool(chance.random() < 0.5),
        back_at=min(at + float(chance.exponential(60)), rage_s),
    )


def _corruption(chance: np.random.Generator, nodes: list[str], rage_s: float) -> DrawnCorruption:
    at = float(chance.uniform(0, rage_s))
    named: tuple[NodeId, ...] | None = None
    if chance.random() < 0.4:
        some = chance.permutation(nodes)[: int(chance.integers(0, len(nodes) + 1))]
        named = tuple(NodeId(str(node)) for node in some)
    return DrawnCorruption(
        at=at,
        node=NodeId(str(chance.choice(nodes))),
        habit=Habit(
            found_after_s=float(chance.exponential(30)),
            verified_every=int(chance.integers(1, 30)),
            proven=named is None and bool(chance.random() < 0.5),
            named=named,
        ),
        back_at=min(at + float(chance.exponential(120)), rage_s),
    )


def _profile(chance: np.random.Generator, run: TrainingRun) -> Profile:
    scale = float(chance.choice([0.1, 1.0, 3.0]))

    def about(value: float) -> Constant:
        drawn = value * scale * float(chance.lognormal(0.0, 0.7))
        return Constant(drawn, "assumed", "drawn by the seed")

    silence_s = compose.check(run, "the drawn run").silence_s
    return Profile(
        name="drawn", order=about(0.02), exit=about(0.02), trouble=about(1.0), stop=about(0.3),
        seat=about(0.1), warm=about(0.5), rendezvous=about(0.5), load=about(0.5),
        fetch=about(0.5), read=about(3.0), first_step=about(0.5), step=about(0.5),
        stall=about(0.01), copy=about(0.3), write=about(2.0), commit=about(0.2),
        search=about(0.5), reboot=about(5.0),
        gone=about(0.2) if chance.random() < 0.5 else Constant(10 * silence_s, "assumed", "never"),
    )  # fmt: skip


def conduct(seed: int, record: Callable[[Entry], None] | None = None) -> Outcome:
    """Run one seed; raise AssertionError if anything is not as it must be.

    Args:
        seed: what to draw by.
        record: takes what goes into the journal.
    """
    drawn = draw(seed)
    chance = np.random.Generator(np.random.Philox(seed + (1 << 40)))
    twice = np.random.Generator(np.random.Philox(seed + (2 << 40)))
    timeouts = compose.check(drawn.run, "the drawn run")
    world = SimulatedWorld(
        drawn.run,
        timeouts,
        drawn.profile,
        chance=chance,
        faults=drawn.plan.drawn(),
        jitter=drawn.jitter,
    )
    calm_at = Seconds(drawn.rage_s)
    unruly = np.random.Generator(np.random.Philox(seed + (5 << 40)))
    world.cluster.wire = Wire(
        world.cluster.agenda, unruly, drawn.unruly, drawn.late_s, until=calm_at
    )
    _disturb(world, drawn, chance)
    simulation = Simulation(
        drawn.run,
        world,
        checkers=[
            Invariants(loss_of=lambda step: 1.0 / step),
            Redelivery(lambda: bool(twice.random() < TWICE_RATE)),
            Liveness(calm_at, RESTARTS_MAX),
        ],
        dying=Dying(chance, drawn.death_rate, calm_at, 3 * timeouts.silence_s),
        record=record,
    )
    within_s = _within(drawn, timeouts.warmup_s)
    over = simulation.conduct(Seconds(calm_at + within_s))
    state = simulation.controller.state
    assert over, (
        f"still {state.phase} {within_s:.0f} s after the last fault, at step {state.reached_step} "
        f"of {drawn.run.spec.trainer.steps}"
    )
    if state.phase is RunPhase.SUCCEEDED:
        # Who computes wrong numbers after the last step has made nothing wrong.
        last = drawn.run.spec.trainer.steps
        made_wrong = world.corruption.wrong(state.generation).items()
        wrong = {node for node, after in made_wrong if after < last} - world.corruption.sought
        assert not wrong, f"succeeded with what {sorted(wrong)} made wrong, as was known"
    told = report(state)
    return Outcome(
        seed, told.state, told.reason, told.generations, told.controllers,
        len(simulation.entries), told.wall_s,
    )  # fmt: skip


def _within(drawn: Drawn, warmup_s: float) -> float:
    steps_s = drawn.run.spec.trainer.steps * drawn.profile.step.value * (1 + drawn.jitter) * 5
    spare_s = seconds(drawn.run.spec.recovery.spare_wait)
    return PATIENCE * (warmup_s + spare_s) + steps_s


def _corrupt(world: SimulatedWorld, drawn: Drawn) -> None:
    """Enter which nodes compute wrong numbers, and when they are sound again."""
    agenda = world.cluster.agenda
    for wrong in drawn.corruptions:
        do = partial(world.corruption.corrupt, wrong.node, wrong.habit)
        agenda.at(Seconds(wrong.at), do)
        agenda.at(Seconds(wrong.back_at), partial(world.corruption.heal, wrong.node))
        # Whoever was suspected with it has passed its tests.
        suspects = tuple(sorted({wrong.node, *(wrong.habit.named or ())}))
        back = partial(world.uncordon, suspects, "the swarm")
        agenda.at(Seconds(wrong.back_at), back)


def _disturb(world: SimulatedWorld, drawn: Drawn, chance: np.random.Generator) -> None:
    """Enter what is not in the plan: outages of the store, drains, connections that break."""
    cluster = world.cluster
    for start, end in drawn.outages:
        cluster.agenda.at(Seconds(start), partial(setattr, cluster.store, "down", True))
        cluster.agenda.at(Seconds(end), partial(setattr, cluster.store, "down", False))
    cuts = chance.poisson(drawn.cut_rate * drawn.rage_s * len(cluster.nodes))
    for drain in drawn.drains:
        ask = partial(world.drain, drain.nodes, "the swarm", "drawn", drain.within_s)
        cluster.agenda.at(Seconds(drain.at), ask)
        back = partial(world.uncordon, drain.nodes, "the swarm")
        cluster.agenda.at(Seconds(drain.back_at), back)
        if drain.taken and drain.within_s is not None:
            for name in drain.nodes:
                take = partial(cluster.lose, cluster.nodes[name], back=True)
                cluster.agenda.at(Seconds(drain.at + drain.within_s), take)
    _corrupt(world, drawn)
    names = sorted(cluster.nodes)
    for at in sorted(chance.uniform(0, drawn.rage_s, cuts).tolist()):
        node = cluster.nodes[names[int(chance.integers(len(names)))]]
        cluster.agenda.at(Seconds(at), partial(cluster.cut, node))

    def heal() -> None:
        cluster.agenda.after(REPAIR_S, heal)
        for node in cluster.nodes.values():
            if not node.alive:
                cluster.repair(node)
            elif not node.reachable:
                cluster.rejoin(node)

    # A node that was lost for good is repaired in the end: there are enough of them again. More
    # than once: what is planned counts from the first step, and that may be late.
    cluster.agenda.at(Seconds(drawn.rage_s), heal)
