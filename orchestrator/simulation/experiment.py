"""One experiment with one seed: the real controller through a whole run, and what came of it."""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import numpy as np
import xxhash

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision, StartGeneration
from orchestrator.core.events import Event
from orchestrator.faults.draw import draw, fitting_counts, replay
from orchestrator.faults.expected import expected
from orchestrator.faults.model import FaultModel
from orchestrator.faults.quantities import span_s
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.schedule import Schedule
from orchestrator.policy import arithmetic
from orchestrator.policy.arithmetic import Leaving
from orchestrator.protocol.ids import NodeId, Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation import accounts
from orchestrator.simulation.accounts import Charge, Moment
from orchestrator.simulation.constants import PLANNED_OUT
from orchestrator.simulation.drive import Checker, Simulation
from orchestrator.simulation.effects import Chances, Effects
from orchestrator.simulation.machines import Machines
from orchestrator.simulation.settings import Care, Settings, SettingsError, care, run_file
from orchestrator.simulation.signs import sign_of
from orchestrator.simulation.wrong import wrong_for_s
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.flaws import Flaws
from orchestrator.worlds.simulated.profile import Constant, Profile
from orchestrator.worlds.simulated.watching import Detectors, Watching
from orchestrator.worlds.simulated.world import SimulatedWorld

SPARES_PROBABILITY = 0.9
LOOK_EVERY_S = 600.0
"""Between two looks at a world in which nothing is amiss; see `SimulatedWorld`."""
NEVER_S = 1e12
"""Longer than any run."""
OVER = "over"
"""Bucket of the time after a run has given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What an experiment rests on, read from files."""

    settings: Settings
    model: FaultModel
    record: FaultRecord | None
    profile: Profile

    @property
    def spares(self) -> int:
        """Hot spare nodes: as asked for, or most probably enough from the first day to the last."""
        settings = self.settings
        if settings.spares is not None:
            return settings.spares
        means = expected(
            self.model,
            settings.cluster,
            factor=settings.rates,
            factors=settings.class_rates,
            step_s=self.profile.step.value,
        )
        operations = Leaving(1, means.planned_per_day, PLANNED_OUT.value)
        return arithmetic.spares_all_along(
            [
                each._replace(out_s=settings.repair * each.out_s)
                for each in (operations, *(Leaving(*each) for each in means.together))
            ],
            days=settings.days,
            most=settings.nodes,
            probability=SPARES_PROBABILITY,
        )

    @property
    def care(self) -> Care:
        """How the run is looked after."""
        undone_s = [
            wrong_for_s(each, self.profile.habits, shows=False)
            for each in self.model.classes
            if sign_of(each) == "wrong"
        ]
        return care(
            self.settings, self.profile, spares=self.spares, undone_s=max(undone_s, default=0.0)
        )

    def digest(self) -> str:
        """Return what tells apart files of one name that have changed, and versions of holdfast."""
        read = (version("holdfast"), self.model, self.record, self.profile)
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(read))

    def run_file(self) -> TrainingRun:
        """Return what the controller is asked to look after."""
        return run_file(self.settings, self.profile, self.care)

    @property
    def flaws(self) -> Flaws:
        """What is wrong with the job itself."""
        if self.settings.poison_after is None:
            return Flaws()
        steps = span_s(self.settings.poison_after) / self.profile.step.value
        return Flaws(raises_at=Step(max(round(steps), 1)))

    def alarms(self, chance: np.random.Generator) -> list[float]:
        """Draw when detectors name a node that is healthy, seconds."""
        horizon_s = self.settings.horizon_s
        steps = horizon_s / self.profile.step.value
        count = chance.poisson(self.settings.false_alarms * steps)
        moments: list[float] = np.sort(chance.uniform(0, horizon_s, count)).tolist()
        return moments

    def schedule(self, chance: np.random.Generator) -> Schedule:
        """Draw what befalls the job."""
        settings, step_s = self.settings, self.profile.step.value
        if self.record is not None:
            return replay(
                self.record,
                self.model,
                settings.cluster,
                days=settings.days,
                rng=chance,
                scaled=settings.scale_record,
                background=settings.background,
                step_s=step_s,
            )
        return draw(
            self.model,
            settings.cluster,
            days=settings.days,
            rng=chance,
            clock=settings.clock,
            factor=settings.rates,
            factors=settings.class_rates,
            step_s=step_s,
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one seed. Times are seconds."""

    seed: int
    state: str
    """The phase at the end; Failed if the run was given up."""
    reason: str
    ettr: float
    """Effective training time over wall clock; steps count in full however slow they are."""
    throughput: float
    """Steps of the final lineage at the speed of the profile over wall clock: with slow steps."""
    ledger: dict[str, float]
    """Seconds per bucket; they sum to the wall clock."""
    daily: list[float]
    """Effective share of each day."""
    charges: list[Charge]
    """What the lost time was lost to: by class of fault and kind of incident."""
    interruptions: dict[str, int]
    """unexpected, planned, mistaken: what was let loose that the job can not go on with."""
    by_class: dict[str, int]
    """All that was let loose and would be noticed."""
    unseen: dict[str, int]
    missed: dict[str, int]
    incidents: dict[str, int]
    """By kind, as the controller saw them."""
    rungs: dict[str, int]
    """Generations by the rung that started them."""
    moments: list[Moment]
    """Incidents by time."""
    spares: dict[str, float]
    steps: int
    lost_steps: int
    silent: dict[str, int]
    """Silent corruptions by kind, and whether a detector noticed them."""
    silent_s: float
    """For how long a node computed wrong numbers and nobody knew; what came of it is undone."""
    events: int
    controller_s: float
    """Processor time of the controller: its wall clock, times the share that the process had."""
    wall_s: float
    """Of the simulation."""
    max_rss_mb: float
    """The most memory that the process has had so far."""


class _Clocks:
    """How long something has taken, and how much of a processor it had."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    @property
    def wall_s(self) -> float:
        """Wall clock since then."""
        return time.perf_counter() - self._wall_s

    @property
    def busy(self) -> float:
        """Share of the wall clock for which this process had a processor, at most 1."""
        return min((time.process_time() - self._cpu_s) / max(self.wall_s, 1e-9), 1.0)


class Observer:
    """Follows what the controller orders: who has a seat, and how often spares were taken."""

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._seats: tuple[NodeId, ...] = ()
        self.swaps = 0

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Take in what was decided about an event."""
        del controller, event
        for decision in decisions:
            if isinstance(decision, StartGeneration):
                if self._seats and self._seats != decision.seats:
                    self.swaps += len(set(decision.seats) - set(self._seats))
                self._seats = decision.seats
                self._effects.seated(decision.seats)


def inputs(settings: Settings) -> Inputs:
    """Read what an experiment rests on.

    Raises:
        BadFileError: if a file is not what it should be.
        SettingsError: if the settings do not fit together.
        ModelError: if they do not fit the model, or the record the cluster.
    """
    model = compose.named(settings.model, compose.read_model, compose.packaged_model)
    record = None
    if settings.record is not None:
        record = compose.named(
            settings.record,
            lambda path: compose.read_record(path, model),
            lambda name: compose.packaged_record(model, name),
        )
        fitting_counts(
            record, model, settings.cluster, days=settings.days, scaled=settings.scale_record
        )
    profile = compose.named(settings.profile, profiles.read, profiles.packaged)
    found = Inputs(
        settings=settings.checked(model, record),
        model=model,
        record=record,
        profile=_watched(profile.scaled(gpus=settings.gpus), settings.watch),
    )
    habits = found.profile.habits
    silent = None if habits is None else habits.silent
    if settings.false_alarms and (silent is None or silent.watching.value == "none"):
        raise SettingsError(
            f"falseAlarms is {settings.false_alarms:g}, and nothing watches for corruption",
            "leave it out, or choose what watches with `watch`",
        )
    compose.check(found.run_file(), "the experiment")
    return found


def _watched(profile: Profile, asked: Detectors | None) -> Profile:
    """Return a profile whose corruption is watched for as was asked for.

    Raises:
        SettingsError: if the profile does not say what its detectors would see.
    """
    if asked is None:
        return profile
    habits = profile.habits
    if habits is None or habits.silent is None:
        raise SettingsError(
            f"watch is {asked!r}, and profile {profile.name!r} does not say what detectors notice",
            "leave it out, or add habits.silent to the profile (`holdfast explain profile`)",
        )
    watching = Watching(value=asked, origin="assumed", source="as was asked for")
    silent = msgspec.structs.replace(habits.silent, watching=watching)
    return msgspec.structs.replace(profile, habits=msgspec.structs.replace(habits, silent=silent))


def _replay_every(profile: Profile) -> int:
    """Return after how many steps ranks compute each other's micro-batches once more; 0: never."""
    silent = None if profile.habits is None else profile.habits.silent
    return silent.replay_every.value if silent and silent.watching.value == "both" else 0


def _uncopied(profile: Profile) -> Profile:
    """Return a profile without copies to buddies, if its system has none."""
    if profile.habits is None or profile.habits.buddies.value == "kept":
        return profile
    never = Constant(NEVER_S, profile.habits.buddies.origin, profile.habits.buddies.source)
    return msgspec.structs.replace(profile, copy=never)


def conduct(
    given: Inputs,
    seed: int,
    record: Callable[[journal.Entry], None] | None = None,
    checkers: Sequence[Checker] = (),
) -> Outcome:
    """Run an experiment with one seed.

    Args:
        given: what it rests on.
        seed: what to draw by; the same seed gives the same journal.
        record: takes what goes into the journal.
        checkers: asked at every event, which takes a month of many nodes far longer.
    """
    began = _Clocks()
    streams = np.random.SeedSequence(seed).spawn(6)
    faults, befalling, repairs, world_s, silent, alarming = (
        np.random.Generator(np.random.PCG64(stream)) for stream in streams
    )
    run = given.run_file()
    schedule = given.schedule(faults)
    world = SimulatedWorld(
        run,
        compose.check(run, "the experiment"),
        _uncopied(given.profile),
        chance=world_s,
        flaws=given.flaws,
        look_every_s=LOOK_EVERY_S,
        replay_every=_replay_every(given.profile),
    )
    settings, habits = given.settings, given.profile.habits
    world.cluster.forgetful = given.care.forgets
    machines = Machines(world, schedule, given.model, settings.repair, repairs)
    if habits is not None and habits.requeue is not None:
        machines.requeue_s = habits.requeue.value
    effects = Effects(
        world,
        schedule,
        given.model,
        recorded=frozenset(given.record.counts if given.record is not None else ()),
        machines=machines,
        habits=habits,
        chances=Chances(befalling, silent),
    )
    if habits is not None and habits.silent is not None:
        effects.raise_alarms(given.alarms(alarming), habits.silent)
    observer = Observer(effects)
    simulation = Simulation(run, world, checkers=[observer, *checkers], record=record, keep=False)
    with _uncollected():
        simulation.conduct(Seconds(settings.horizon_s))
    # A controller with half its detectors is not the one that was asked about.
    assert not simulation.controller.disabled, f"detectors raised: {simulation.controller.disabled}"
    return _outcome(given, seed, simulation, effects, machines, observer, began)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: a run of months makes none in circles.

    To look through a world of 16,384 ranks again and again took a twentieth of the time; the memory
    that it gave back is none.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _outcome(
    given: Inputs,
    seed: int,
    simulation: Simulation,
    effects: Effects,
    machines: Machines,
    observer: Observer,
    began: _Clocks,
) -> Outcome:
    state, settings = simulation.controller.state, given.settings
    horizon_s = settings.horizon_s
    ledger = {str(bucket): us / 1e6 for bucket, us in state.ledger.totals().items()}
    ledger[OVER] = max(round(horizon_s * 1e6) - state.ledger.end_us, 0) / 1e6
    wall_s = sum(ledger.values())
    sorts = Counter(struck.sort for struck in effects.log)
    causes = accounts.causes(state, effects.log)
    late_s = accounts.unnoticed_s(state, causes)
    ledger["lost_work"] -= sum(late_s.values())
    ledger["detect"] += sum(late_s.values())
    return Outcome(
        seed=seed,
        state=state.end_state or str(state.phase),
        reason=state.end_reason,
        ettr=ledger["effective"] / wall_s,
        throughput=state.reached_step * given.profile.step.value / wall_s,
        ledger=ledger,
        daily=accounts.daily(state.ledger, horizon_s),
        charges=accounts.charges(state, causes, late_s),
        interruptions={
            "unexpected": sorts["seen"] + sorts["silent"],
            "planned": sorts["planned"],
            "mistaken": sorts["mistaken"],
        },
        by_class=_counted(struck.name for struck in effects.log),
        unseen=dict(effects.unseen),
        missed=dict(effects.missed),
        incidents=_counted(incident.kind for incident in state.incidents),
        rungs=dict(sorted(state.rungs.items())),
        moments=accounts.moments(state, causes),
        spares={
            "there": given.care.spares,
            "swaps": observer.swaps,
            "removals": machines.use.removals,
            "away_most": machines.use.away_most,
            "waited_s": ledger["wait_for_nodes"],
        },
        steps=state.reached_step,
        lost_steps=sum(incident.lost_steps for incident in state.incidents),
        silent=effects.silent,
        silent_s=accounts.silent_s(effects.log, horizon_s),
        events=simulation.events,
        controller_s=simulation.controller_s * began.busy,
        wall_s=began.wall_s,
        max_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
