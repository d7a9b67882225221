"""Scripted nodes whose machines have serials, and a device ledger that keeps what it is told."""

from typing import Any

from orchestrator.core.decisions import Decision, JudgeDevice, PreflightDevices, StartGeneration
from orchestrator.core.events import ControllerStarted, DeviceJudged, DeviceKnown, DevicesKnown
from orchestrator.core.phases import RunPhase
from orchestrator.core.standing import ACTORS, Act, DeviceVerdict, Proof, Record, Standing, fold
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Serial
from orchestrator.protocol.messages import Preflighted
from tests import runfiles
from tests.conftest import Cluster

NODES = ("node-0", "node-1", "node-2")
EMBEDDED = runfiles.text(trainer={"steps": 5000})


class Fleet(Cluster):
    """Nodes with serials, and a ledger that puts on record what it is told to."""

    def __init__(self, text: str = EMBEDDED) -> None:
        super().__init__(text)
        self.verdicts: list[DeviceVerdict] = []
        self.machines = {node: Serial(f"m{node[-1]}") for node in NODES}
        self.gpus: dict[str, tuple[Device, ...]] = {}

    def join(self, node: str, **options: Any) -> list:
        device = Device(self.machines.get(node, Serial("m9")), "machine", "stated")
        return super().join(node, devices=(device, *self.gpus.get(node, ())), **options)

    def record(self, serial: str, *acts: Act, days_ago: float = 0.0) -> None:
        """Somebody else has put verdicts on record before."""
        for act in acts:
            self.verdicts.append(
                DeviceVerdict(
                    serial=Serial(serial),
                    act=act,
                    actor=ACTORS[act][0],
                    by="x",
                    reason=f"{act} elsewhere",
                    proof=Proof.REPLAY if act is Act.CONVICTED else Proof.NONE,
                    at=self.now - days_ago * 86_400.0,
                    id=f"x/{len(self.verdicts)}",
                )
            )

    def know(self, problem: str = "") -> list[Decision]:
        """The run hears of what is on record."""
        devices = tuple(_known(r) for _, r in sorted(fold(self.verdicts).items()))
        return self.tell(DevicesKnown(at=self.at(), devices=devices, problem=problem))

    def keep(self, decisions: list[Decision]) -> list[JudgeDevice]:
        """What was ordered is put on record, and the run hears so."""
        orders = [d for d in decisions if isinstance(d, JudgeDevice)]
        for order in orders:
            if all(verdict.id != order.id for verdict in self.verdicts):
                self.verdicts.append(order.verdict(at=self.now))
            record = fold(self.verdicts)[order.device.serial]
            self.tell(DeviceJudged(at=self.at(), id=order.id, device=_known(record)))
        return orders

    def where(self, serial: str) -> Standing:
        return fold(self.verdicts)[Serial(serial)].standing


def _known(record: Record) -> DeviceKnown:
    return DeviceKnown(record.serial, record.standing, record.why)


def begun(fleet: Fleet) -> Fleet:
    """A controller takes over, knows the ledger, and every node joins."""
    fleet.tell(ControllerStarted(at=fleet.at(), incarnation=1))
    fleet.know()
    for node in NODES:
        fleet.join(node)
    if fleet.state.phase is RunPhase.SEARCHING:
        fleet.found()
        fleet.resume()
        fleet.hold(0)
    return fleet


def preflights(fleet: Fleet) -> list[PreflightDevices]:
    return [d for d in fleet.decisions if isinstance(d, PreflightDevices)]


def starts(fleet: Fleet) -> list[StartGeneration]:
    return [d for d in fleet.decisions if isinstance(d, StartGeneration)]


def answer(fleet: Fleet, node: str, **said: Any) -> list[Decision]:
    order = preflights(fleet)[-1]
    return fleet.say(node, Preflighted(serials=order.serials, **{"compared": 9, **said}))
