"""What a run hears of the device ledger, and what becomes of the verdicts that it orders."""

import queue
import threading
from collections.abc import Iterator

import msgspec
import pytest

from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.events import DeviceJudged, DevicesKnown, Event
from orchestrator.core.standing import Act, DeviceVerdict, Proof, Standing
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Serial
from orchestrator.worlds import registrar as registrars
from orchestrator.worlds.devices import DeviceLedger
from orchestrator.worlds.lane import LEFT_MAX
from orchestrator.worlds.registrar import Registrar
from storage.blob import BlobStore
from storage.errors import StorageFullError
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


def fail_once(store: FaultyStore) -> None:
    """Have the first put find the disk full, and all others room."""
    left = [True]

    def fail(operation: str, key: str) -> None:
        if operation == "put" and left:
            left.clear()
            raise StorageFullError(key)

    store.before = fail


def released(name: str) -> JudgeDevice:
    return msgspec.structs.replace(
        ORDER, id=name, act=Act.RELEASED, actor="operator", proof=Proof.NONE
    )


def test_verdicts_are_on_record_in_the_order_in_which_they_were_ordered(
    store: FaultyStore, one: Registrar
) -> None:
    fail_once(store)

    one.judge(ORDER, Told())
    one.judge(released("b"), Told())

    assert one.settle(WAIT_S)
    ledger = DeviceLedger(store)
    ledger.refresh()
    assert [verdict.id for verdict in ledger.verdicts] == [ORDER.id, "b"]


def test_at_the_end_what_is_pending_is_tried_once_more(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrars, "AGAIN_S", 1e6)
    one, told = of(store), Told()
    fail_once(store)
    one.judge(ORDER, told)
    told.next()

    assert one.settle(WAIT_S)


def test_a_ledger_that_can_be_read_and_not_written_is_told_once(
    store: FaultyStore, one: Registrar
) -> None:
    told, looks, puts = Told(), threading.Semaphore(0), threading.Semaphore(0)
    store.before = lambda operation, _: (puts if operation == "put" else looks).release()
    store.full = True
    one.watch(told)
    one.judge(ORDER, told)

    for _ in range(20):
        assert looks.acquire(timeout=WAIT_S)
    for _ in range(3):
        assert puts.acquire(timeout=WAIT_S)
    store.full = False

    events = [told.next()]
    while not isinstance(events[-1], DeviceJudged):
        events.append(told.next())
    problems = [event.problem for event in events if isinstance(event, DevicesKnown)]
    assert [words[:9] for words in problems if words] == ["a verdict"]
    assert one.settle(WAIT_S)


def hang(store: FaultyStore) -> threading.Event:
    """Have the store not answer until the event is set."""
    going_on = threading.Event()
    store.before = lambda _operation, _key: bool(going_on.wait(WAIT_S)) and None
    return going_on


def test_a_ledger_that_hangs_keeps_nobody_waiting(store: FaultyStore) -> None:
    going_on = hang(store)
    hanging = of(store, within_s=0.05)

    assert "did not answer within 0.05 s" in hanging.at_start().problem
    hanging.judge(ORDER, Told())

    assert not hanging.settle(0.0), "it is ordered, and not on record"
    going_on.set()


def test_what_a_ledger_that_hung_at_the_start_says_is_heard_when_it_goes_on(
    store: FaultyStore,
) -> None:
    say(store, Act.RETIRED, "a")
    going_on = hang(store)
    hanging, told = of(store, within_s=0.05), Told()
    assert "did not answer" in hanging.at_start().problem

    going_on.set()
    hanging.watch(told)

    while not (event := told.next()).devices:  # type: ignore[union-attr]
        assert isinstance(event, DevicesKnown)
    hanging.settle(WAIT_S)


def test_a_verdict_whose_turn_does_not_come_is_on_record_once_the_ledger_goes_on(
    store: FaultyStore,
) -> None:
    going_on = hang(store)
    hanging, told = of(store, within_s=0.05), Told()
    for _ in range(LEFT_MAX):
        hanging.at_start()

    hanging.judge(ORDER, told)
    hanging.at_start()  # so long, the verdict waits for its turn
    going_on.set()

    while not isinstance(told.next(), DeviceJudged):
        pass
    assert hanging.settle(WAIT_S)
