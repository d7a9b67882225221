"""Devices of simulated nodes, and a ledger of verdicts about them that outlives the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from orchestrator.core.decisions import JudgeDevice, PreflightDevices
from orchestrator.core.events import DeviceJudged, DeviceKnown, DevicesKnown
from orchestrator.core.standing import Act, Actor, DeviceVerdict, Proof, fold
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import NodeId, Serial
from orchestrator.protocol.messages import Preflighted
from orchestrator.worlds.simulated.cluster import Cluster

ANSWERS = 100
"""Of a preflight."""
_DAY_S = 86_400.0


class SimLedger:
    """One for a cluster; empty, and of no device, unless somebody says otherwise.

    Args:
        cluster: the machines.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._verdicts: list[DeviceVerdict] = []
        self._failing: frozenset[Serial] = frozenset()

    def equip(self, serials: Mapping[NodeId, Serial], failing: Collection[Serial] = ()) -> None:
        """Give nodes machines with serials; some of these fail every test."""
        for node, serial in serials.items():
            self._cluster.nodes[node].devices = (Device(serial, "machine", "stated"),)
        self._failing = frozenset(failing)

    def say(
        self,
        serial: Serial,
        acts: Sequence[Act],
        *,
        by: Actor = "operator",
        days_ago: float = 0.0,
        reason: str = "",
    ) -> None:
        """Have somebody add verdicts, one after the other, and the run hear of it."""
        for act in acts:
            self._verdicts.append(
                DeviceVerdict(
                    serial=serial,
                    act=act,
                    actor=by,
                    by=by,
                    reason=reason,
                    proof=Proof.REPLAY if act is Act.CONVICTED else Proof.NONE,
                    run="another",
                    at=self._cluster.now - days_ago * _DAY_S,
                    id=f"{by}/{len(self._verdicts)}",
                )
            )
        self.tell()

    def tell(self) -> None:
        """Have the run know what is on record, if anything is."""
        if self._verdicts:
            records = sorted(fold(self._verdicts).items())
            known = tuple(DeviceKnown(r.serial, r.standing, r.why) for _, r in records)
            self._cluster.emit(DevicesKnown(at=self._cluster.now, devices=known))

    def judge(self, order: JudgeDevice) -> None:
        """Put a verdict on record, and say so; ordered again, it is there once."""
        if all(known.id != order.id for known in self._verdicts):
            self._verdicts.append(order.verdict(at=self._cluster.now))
        record = fold(self._verdicts)[order.device.serial]
        device = DeviceKnown(record.serial, record.standing, record.why)
        self._cluster.emit(DeviceJudged(at=self._cluster.now, id=order.id, device=device))

    def preflight(self, order: PreflightDevices) -> None:
        """Have a node compute what is known beforehand, and say what came of it."""
        node = self._cluster.nodes[order.node]
        wrong = sorted(self._failing.intersection(order.serials))
        fact = Preflighted(
            serials=order.serials,
            compared=ANSWERS,
            wrong=f"a product came out wrong on {wrong[0]}" if wrong else "",
        )
        self._cluster.agenda.after(order.within_s, partial(self._cluster.say, [node], fact))
