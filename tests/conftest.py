"""What tests share: a hypothesis profile, and scripted nodes around a real controller."""

import os
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import settings

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.decisions import Decision, StartGeneration
from orchestrator.core.events import (
    CheckpointFound,
    ControllerStarted,
    Event,
    NodeLost,
    Reported,
    Telemetry,
    Tick,
)
from orchestrator.core.invariants import violations
from orchestrator.core.phases import RunPhase
from orchestrator.core.report import Report
from orchestrator.core.state import RunState
from orchestrator.core.trust import Verdict
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import (
    MARKS,
    PROTOCOL_VERSION,
    Fact,
    GroupCounts,
    Holding,
    Joined,
    RankExited,
    Reached,
    ShardsHeld,
    StepReport,
)
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.runfile import TrainingRun
from tests import buckets, runfiles, tiny

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("dev", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

RUN = runfiles.text(trainer={"steps": 1000})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds", type=int, default=2, help="fault plans to draw for whole runs (default 2)"
    )
    parser.addoption(
        "--rewrite", action="store_true", help="write golden scenarios anew; review the diff"
    )


class Cluster:
    """Nodes that say what they are told to say, to a controller that is the real one."""

    def __init__(self, text: str = RUN) -> None:
        self.run = compose.parse(text, TrainingRun, "run.yaml")
        self.controller = compose.controller(self.run)
        self.now = 0.0
        self.entries: list[journal.Entry] = []
        self.progress = 0
        self.decisions: list[Decision] = []

    @property
    def state(self) -> RunState:
        return self.controller.state

    def tell(self, event: Event) -> list[Decision]:
        decisions = self.controller.handle(event)
        self.entries.append(
            journal.Entry(seq=len(self.entries) + 1, event=event, decisions=tuple(decisions))
        )
        self.decisions += decisions
        assert violations(self.state) == []
        return decisions

    def at(self) -> Seconds:
        return Seconds(self.now)

    def after(self, seconds: float) -> "Cluster":
        self.now = round(self.now + seconds, 6)
        return self

    def say(self, node: str, fact: Fact) -> list[Decision]:
        return self.tell(Reported(at=self.at(), node=NodeId(node), fact=fact))

    def join(
        self,
        node: str,
        *,
        incarnation: int = 1,
        generation: int = 0,
        mark: int = 0,
        holdings: tuple[Holding, ...] = (),
        devices: tuple[Device, ...] = (),
    ) -> list:
        return self.say(
            node,
            Joined(
                node=NodeId(node),
                version=PROTOCOL_VERSION,
                incarnation=incarnation,
                pid=1,
                peer_address="127.0.0.1:1",
                generation=Generation(generation),
                mark=mark,
                holdings=holdings,
                devices=devices,
            ),
        )

    def lose(self, node: str) -> list[Decision]:
        return self.tell(NodeLost(at=self.at(), node=NodeId(node), evidence=f"{node} ended"))

    def tick(self) -> list[Decision]:
        return self.tell(Tick(at=self.at()))

    def exit(
        self, rank: int, code: int = -9, *, step: int = 0, kind: str = "", refused: bool = False
    ) -> list[Decision]:
        return self.say(
            self.state.seats[rank],
            RankExited(
                generation=self.state.generation,
                rank=Rank(rank),
                pid=1,
                code=code,
                phase=int(RankPhase.FORWARD),
                step=Step(step),
                kind=kind,
                message="x",
                traceback='  File "a.py", line 1, in f' if kind else "",
                misconfigured=refused,
            ),
        )

    def found(
        self,
        step: int | None = None,
        rejected: tuple[str, ...] = (),
        *,
        graded: bool = False,
        ungraded: tuple[str, ...] = (),
    ) -> list[Decision]:
        return self.tell(
            CheckpointFound(
                at=self.at(),
                step=None if step is None else Step(step),
                epoch=None if step is None else self.state.generation,
                key="" if step is None else f"commits/{step}",
                rejected=rejected,
                grade=Verdict.COMPUTE_VERIFIED if graded else None,
                ungraded=ungraded,
            )
        )

    def reach(self, mark: str) -> None:
        for node in self.state.world:
            self.say(node, Reached(generation=self.state.generation, mark=MARKS.index(mark)))

    def hold(self, step: int) -> None:
        """Every node of the world holds its own shards and its neighbour's."""
        world = self.state.world
        for node in world:
            ranks = [Holding(Rank(r), Step(step)) for r in range(self.run.world_size)]
            self.say(node, ShardsHeld(generation=self.state.generation, holdings=tuple(ranks)))

    def beat(
        self,
        *,
        step: int,
        moving: Callable[[int], bool] = lambda _: True,
        phases: dict[int, RankPhase] | None = None,
        states: str | None = None,
        steps: dict[int, int] | None = None,
        report: bool = False,
        heard: tuple[str, ...] | None = None,
        loss: float = 2.0,
        seconds: float = 0.1,
        digests: tuple[tuple[Step, str], ...] = (),
        replayed: int = 0,
        groups: tuple[GroupCounts, ...] = (),
    ) -> list[Decision]:
        """Telemetry of all ranks; those not `moving` show no sign of life."""
        world = len(self.state.seats) or self.run.world_size
        self.progress += 1
        known = self.state.fleet.progress_R
        entered = [0] * world if groups else [-1]
        left = list(entered)
        for row in groups:
            for rank, came, went in zip(row.ranks, row.entered, row.left, strict=True):
                entered[rank] += came
                left[rank] += went
        return self.tell(
            Telemetry(
                at=self.at(),
                generation=self.state.generation,
                heard=tuple(map(NodeId, heard)) if heard else tuple(sorted(self.state.nodes)),
                phases=tuple(int((phases or {}).get(r, RankPhase.FORWARD)) for r in range(world)),
                steps=tuple((steps or {}).get(r, step) for r in range(world)),
                progress=tuple(self.progress if moving(r) else int(known[r]) for r in range(world)),
                states=states or "S" * world,
                cpu_s=(0.0,) * world,
                stall_s=0.0,
                reports=(StepReport(Step(step), loss, 1.0, 100, seconds),) if report else (),
                digests=digests,
                replayed=Step(replayed),
                entered=tuple(entered),
                left=tuple(left),
                groups=groups,
            )
        )

    def train(self, steps: int, *, seconds: float = 0.1) -> None:
        first = self.state.reached_step + 1
        for step in range(first, first + steps):
            self.after(seconds).beat(step=step, report=True)

    def seated(self) -> tuple[str, ...]:
        """Return the nodes of the newest order, in rank order."""
        orders = [d for d in self.decisions if isinstance(d, StartGeneration)]
        return tuple(dict.fromkeys(orders[-1].seats))

    def go_on(self) -> None:
        """Train again, with what it takes for memory to be whole."""
        if self.state.phase is RunPhase.BACKING_OFF:
            self.rest()
        self.resume()
        self.train(3)
        self.hold(self.state.reached_step)

    def rest(self) -> list[Decision]:
        """Let a back-off pass; return what is decided at its end."""
        until = self.state.pause_until
        assert until is not None
        assert until > self.now
        return self.after(until - self.now + 0.001).tick()

    def start(self) -> StartGeneration:
        """Bring the cluster up to training in generation 1, with the initial state in memory."""
        order = self.begin(("node-0", "node-1", "node-2"))
        self.hold(0)
        return order

    def begin(self, nodes: Iterable[str]) -> StartGeneration:
        """Bring the cluster up to training in generation 1 on these nodes."""
        self.tell(ControllerStarted(at=self.at(), incarnation=1))
        for node in nodes:
            self.join(node)
        (order,) = [d for d in self.found() if isinstance(d, StartGeneration)]
        self.resume()
        return order

    def resume(self) -> None:
        for mark in ("cleared", "seated", "formed", "restored", "stepped"):
            self.after(0.05).reach(mark)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def cluster_of() -> Callable[[str], Cluster]:
    return Cluster


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the Llama of `tests.tiny` comes to with nothing let loose on it."""
    return tiny.undisturbed(tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="session")
def s3() -> Iterator[buckets.Server]:
    """An S3 server, and credentials for it in the environment."""
    yield from buckets.serve()
