"""What a run hears of the device ledger, and what becomes of the verdicts that it orders."""

import queue
import threading
from collections.abc import Iterator

import pytest

from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.events import DeviceJudged, DevicesKnown, Event
from orchestrator.core.standing import Act, DeviceVerdict, Proof, Standing
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Serial
from orchestrator.worlds import registrar as registrars
from orchestrator.worlds.devices import DeviceLedger
from orchestrator.worlds.registrar import Registrar
from storage.blob import BlobStore
from storage.faulty import FaultyStore
from storage.memory import MemoryStore

ORDER = JudgeDevice(
    generation=Generation(1),
    reason="digests differ",
    id="r/0/1/12.0",
    device=Device(Serial("m-1"), "machine", "stated", "XE9680"),
    node=NodeId("node-1"),
    act=Act.CONVICTED,
    actor="controller",
    by="the controller of r",
    proof=Proof.VOTE,
)
WAIT_S = 30.0
"""For what comes at once unless nothing comes."""


class Told:
    """What a registrar tells, in order."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_S)


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrars, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(registrars, "AGAIN_S", 0.01)


def of(store: BlobStore, within_s: float = WAIT_S) -> Registrar:
    return Registrar(
        DeviceLedger(store), "r", lambda: Seconds(7.0), within_s=within_s, wall=lambda: 1e9
    )


@pytest.fixture
def one(store: FaultyStore) -> Iterator[Registrar]:
    made = of(store)
    yield made
    made.settle(WAIT_S)


def say(store: BlobStore, act: Act, name: str) -> None:
    """Have an operator add a verdict by another way."""
    told = DeviceVerdict(
        serial=Serial("m-1"),
        act=act,
        actor="operator",
        by="ann",
        reason="a DIMM",
        at=1e9,
        id=name,
    )
    DeviceLedger(store).add(told)


def test_at_the_start_it_tells_what_is_on_record(store: FaultyStore, one: Registrar) -> None:
    assert one.at_start() == DevicesKnown(at=Seconds(7.0))
    say(store, Act.RETIRED, "a")

    (known,) = of(store).at_start().devices

    assert (known.serial, known.standing, known.why) == ("m-1", Standing.RETIRED, "a DIMM")


def test_a_verdict_that_is_ordered_is_on_record_and_the_run_hears_what_follows(
    store: FaultyStore, one: Registrar
) -> None:
    told = Told()

    one.judge(ORDER, told)

    event = told.next()
    assert isinstance(event, DeviceJudged)
    assert (event.id, event.device.standing) == (ORDER.id, Standing.QUARANTINED)
    ledger = DeviceLedger(store)
    ledger.refresh()
    (verdict,) = ledger.verdicts
    assert (verdict.run, verdict.node, verdict.model, verdict.at) == ("r", "node-1", "XE9680", 1e9)


def test_what_others_add_is_told_once(store: FaultyStore, one: Registrar) -> None:
    told = Told()
    one.at_start()
    one.watch(told)

    say(store, Act.RETIRED, "a")
    say(store, Act.RELEASED, "b")

    events = [told.next()]
    while events[-1].devices[0].standing is not Standing.RETEST:  # type: ignore[union-attr]
        events.append(told.next())
    one.settle(WAIT_S)
    assert len(events) <= 2
    assert told.events.empty()


def test_a_full_disk_is_told_and_the_verdict_is_on_record_once_there_is_room(
    store: FaultyStore, one: Registrar
) -> None:
    told = Told()
    store.full = True
    one.judge(ORDER, told)
    problem = told.next()
    assert isinstance(problem, DevicesKnown)
    assert "a verdict about a device is not on record yet" in problem.problem

    store.full = False

    while not isinstance(event := told.next(), DeviceJudged):
        assert isinstance(event, DevicesKnown)
    assert event.id == ORDER.id
    assert one.settle(WAIT_S)


def test_a_ledger_that_does_not_answer_is_told_and_told_again_when_it_does(
    store: FaultyStore, one: Registrar
) -> None:
    say(store, Act.RETIRED, "a")
    store.down = True
    told = Told()
    assert "does not answer" in one.at_start().problem
    one.watch(told)

    store.down = False

    event = told.next()
    assert isinstance(event, DevicesKnown)
    assert (event.problem, len(event.devices)) == ("", 1)


def test_a_ledger_that_hangs_keeps_nobody_waiting(store: FaultyStore) -> None:
    going_on = threading.Event()
    store.before = lambda _operation, _key: bool(going_on.wait(WAIT_S)) and None
    hanging = of(store, within_s=0.05)
    told = Told()

    assert "did not answer within 0.05 s" in hanging.at_start().problem
    hanging.judge(ORDER, told)

    assert not hanging.settle(0.2), "it is ordered, and not on record"
    going_on.set()
    assert isinstance(told.next(), DeviceJudged)
