"""What Prometheus is told of a run: from the controller's state, and from what went by.

Names and labels are a contract with dashboards and alerts: docs/metrics.md lists them. No label
grows with the run: there is none of ranks, pods or steps, and a node is named only while it is in
quarantine.
"""

from __future__ import annotations

import hashlib
import hmac
import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision
from orchestrator.core.events import Event
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.standing import Standing
from orchestrator.core.state import RunState
from orchestrator.server.counts import Counts

T = TypeVar("T")
Row = tuple[tuple[str, ...], float]
"""Values of labels, and the number."""
CONDITIONS = ("Training", "Spare", "Disconnected", "Lost", "Unusable")
"""Of a node; see `Node.condition`."""


def reading_token(token: str) -> str:
    """Return the token that lets its holder read metrics, and nothing else, of a run.

    Whoever has the run's own token may speak as an agent; that is not for a scraper's settings.
    """
    return hmac.new(token.encode(), b"holdfast metrics", hashlib.sha256).hexdigest()


class Watched:
    """A controller at whose state another thread may look, between two events.

    Args:
        controller: that stands where the last one stood.
        counts: of what is on record.
    """

    def __init__(self, controller: Controller, counts: Counts) -> None:
        self._controller, self._counts = controller, counts
        self._lock = threading.Lock()

    @property
    def state(self) -> RunState:
        """The state, for the thread that handles events."""
        return self._controller.state

    def handle(self, event: Event) -> list[Decision]:
        """See `Controller.handle`."""
        with self._lock:
            decisions = self._controller.handle(event)
            self._counts.take(event, decisions)
        return decisions

    def look(self, at: Callable[[RunState, Counts], T]) -> T:
        """Return what is to be seen in the state; no event is handled meanwhile."""
        with self._lock:
            return at(self._controller.state, self._counts)


class Metrics(Collector):
    """The metrics of one run, as they are when they are asked for.

    Args:
        watched: its controller.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return them in the text format of Prometheus."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Say nothing beforehand: a registry would else collect to find out."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """See `Collector.collect`."""
        yield from self._watched.look(lambda state, counts: list(_all(state, counts)))


def _all(state: RunState, counts: Counts) -> Iterator[Metric]:
    name = state.run.metadata.name
    info = InfoMetricFamily("holdfast_build", "The version of the controller.")
    info.add_metric((), {"version": version("holdfast")})
    yield info
    for family, help_, labels, rows in (*_run(state), *_checkpoints(state, counts), *_nodes(state)):
        # The client adds the ending of a counter by itself.
        kind = CounterMetricFamily if family.endswith("_total") else GaugeMetricFamily
        metric = kind(f"holdfast_{family}", help_, labels=("run", *labels))
        for values, number in rows:
            metric.add_metric((name, *values), number)
        yield metric


Family = tuple[str, str, tuple[str, ...], list[Row]]
"""Name without the prefix, help, labels beside `run`, and the rows."""


def _run(state: RunState) -> Iterator[Family]:
    totals, phases = state.ledger.totals(), [(str(p), float(p is state.phase)) for p in RunPhase]
    yield "run_state", "1 for the phase that the run is in.", ("state",), _rows(phases)
    yield "run_attempt", "The generation: it grows with every restart.", (), _one(state.generation)
    yield "run_step", "The last step of the current lineage.", (), _one(state.reached_step)
    help_ = "Effective over wall clock: the effective training time ratio."
    yield "run_goodput_ratio", help_, (), _one(state.ledger.effective_ratio)
    # No counter: when a run falls back, seconds that were effective become lost work.
    help_ = "What the run's seconds were spent on; in sum, its wall clock."
    spent = [(str(bucket), us / 1e6) for bucket, us in totals.items()]
    yield "run_time_seconds", help_, ("phase",), _rows(spent)
    lost = _lost_seconds(state)
    help_ = "Seconds that were not effective, by the cause of their incident."
    yield "run_lost_seconds", help_, ("cause",), _rows(sorted(lost.items()))
    help_ = "Tokens per second of the newest step that was timed."
    yield "run_tokens_per_second", help_, (), _one(state.tokens_per_s)
    loss = state.losses.get(state.reached_step)
    yield "run_loss", "Loss of the last step.", (), [] if loss is None else _one(loss)
    kinds = Counter(incident.kind for incident in state.incidents)
    yield "incidents_total", "Incidents, by kind.", ("class",), _rows(sorted(kinds.items()))
    help_ = "Incidents that training has not recovered from."
    yield "incidents_open", help_, (), _one(len(state.open_incidents()))
    rungs = sorted(state.rungs.items())
    help_ = "Generations that were started, by rung of the recovery ladder."
    yield "restarts_total", help_, ("ladder",), _rows(rungs)
    steps = sum(incident.lost_steps for incident in state.incidents)
    yield "lost_steps_total", "Steps that had to be computed again.", (), _one(steps)


def _lost_seconds(state: RunState) -> dict[str, float]:
    causes = {incident.id: str(incident.cause) for incident in state.incidents}
    lost_us: Counter[str] = Counter()
    for part in state.ledger.parts():
        if part.bucket is not Bucket.EFFECTIVE and part.incident is not None:
            lost_us[causes[part.incident]] += part.us
    return {cause: us / 1e6 for cause, us in lost_us.items()}


def _checkpoints(state: RunState, counts: Counts) -> Iterator[Family]:
    seen = state.experience
    took = [("memory", _median(seen.copy_s)), ("durable", _median(seen.write_s))]
    help_ = (
        "From the end of a step until its state is safe in the memory of two nodes, or committed; "
        "the median of the newest saves."
    )
    rows = [(tier, seconds) for tier, seconds in took if seconds is not None]
    yield "checkpoint_save_seconds", help_, ("tier",), _rows(rows)
    help_ = "For how long a save keeps training waiting, on average."
    yield "checkpoint_stall_seconds", help_, (), _one(seen.stall_mean_s) if seen.saves else []
    # The newest that a run would go back to: of what is bad, age says nothing.
    good = [known for known in state.commits if known.step in state.sound_commits]
    newest = max(good, key=lambda known: (known.step, known.epoch), default=None)
    age = [] if newest is None else _one(state.now - newest.at)
    help_ = "Since the newest checkpoint of the durable tier that nobody found bad was known."
    yield "checkpoint_age_seconds", help_, (), age
    step = [] if newest is None else _one(newest.step)
    yield "checkpoint_step", "Its step.", (), step
    help_ = "Steps from one save to the next."
    cadence = [("memory", state.cadence.memory), ("durable", state.cadence.durable)]
    yield "checkpoint_interval_steps", help_, ("tier",), _rows(cadence)
    for name, help_, count in (
        ("bytes_total", "Bytes of the bodies of committed checkpoints.", counts.bytes),
        ("commits_total", "Checkpoints that were committed.", counts.commits),
        ("failures_total", "Saves and commits that failed, or were given up.", counts.failures),
        (
            "verify_failures_total",
            "Checkpoints that were found bad, by a scrub, a verdict or a search.",
            counts.damages,
        ),
    ):
        yield f"checkpoint_{name}", help_, (), _one(count)


def _nodes(state: RunState) -> Iterator[Family]:
    conditions = Counter(node.condition(state.seated) for node in state.nodes.values())
    rows = [(condition, conditions[condition]) for condition in CONDITIONS]
    yield "nodes", "Nodes, by condition.", ("state",), _rows(rows)
    quarantined = [(node, 1) for node in sorted(state.quarantined)]
    yield "node_quarantined", "1 for each node in quarantine.", ("node",), _rows(quarantined)
    symptoms = Counter(s.name for node in state.nodes.values() for s in node.symptoms)
    help_ = "Nodes' devices of which the hardware says so now, by signal."
    yield "symptoms", help_, ("signal",), _rows(sorted(symptoms.items()))
    unread = sum(bool(node.unread) for node in state.nodes.values())
    yield "nodes_unread", "Nodes of which not all hardware is read.", (), _one(unread)
    off = len(state.detectors_off)
    yield "detectors_off", "Detectors that raised, and are switched off.", (), _one(off)
    connected = sum(node.connected for node in state.nodes.values())
    standings = Counter(device.standing for device in state.devices.values())
    rows = [(one, standings[one]) for one in Standing if one is not Standing.HEALTHY]
    yield (
        "devices",
        "Devices with something against them in the device ledger, by standing.",
        ("standing",),
        _rows(rows),
    )
    problem = "Whether the device ledger is not known, or not all of it."
    yield "device_ledger_problem", problem, (), _one(bool(state.devices_problem))
    yield "agent_streams", "Agents that are connected.", (), _one(connected)


def _one(number: float) -> list[Row]:
    return [((), float(number))]


def _rows(pairs: Iterable[tuple[str, float]]) -> list[Row]:
    return [((label,), float(number)) for label, number in pairs]


def _median(values: deque[float]) -> float | None:
    return statistics.median(values) if values else None
