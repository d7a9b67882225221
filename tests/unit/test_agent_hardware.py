"""What a node tells of its hardware, whatever becomes of those that read it."""

from concurrent import futures
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.agent.devices import Gpus
from orchestrator.agent.gauges import WITHIN_S
from orchestrator.agent.hardware import Hardware
from orchestrator.agent.identity import identity
from orchestrator.agent.nvml import Nvml
from orchestrator.agent.signals import OFTEN_S, Judge, Look, Probe, Reading
from orchestrator.agent.smart import Smart
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.messages import NodeAiling, NodeUnusable
from tests.gpus import ADDRESSES, OWN, UUIDS, Recorded


class Raising:
    """A probe with a fault of its own."""

    name = "raising"
    every_s = OFTEN_S

    def look(self) -> Look:
        raise ZeroDivisionError("of no use")


class Told:
    """A node's hardware, and what was told of it."""

    def __init__(self, root: Path, *probes: Probe, **options: Any) -> None:
        log = root / "kmsg"
        log.touch()
        config = AgentConfig(
            node=NodeId("node-1"),
            run="r",
            token="t",  # noqa: S106 - of a test
            controller_file="",
            entrypoint="",
            ranks=2,
            memory="",
            work=str(root),
            logs=str(root),
            **{"incarnation": 1, "kernel_log": str(log), "serial": "m-1", **options},
        )
        gpus = Gpus(OWN, ordered=True)
        self.facts: list[Any] = []
        self.hardware = Hardware(
            config, gpus, identity(config, gpus), self.facts.append, probes=probes
        )
        self.now = 0.0

    def look(self, times: int = 1, *, patient: bool = True) -> None:
        """Look so often, once each second of a clock of our own, and wait for answers first."""
        for _ in range(times):
            for watch in self.hardware._gauges._watches if patient else ():
                if watch.answer is not None:
                    futures.wait([watch.answer], timeout=60.0)
            self.now += 1.0
            self.hardware.look(self.now)


ONCE = int(OFTEN_S) + 2
"""So many looks, and all gauges are read once."""


def test_a_row_that_waits_for_a_reset_is_told_once_with_the_serial_of_its_gpu(
    tmp_path: Path,
) -> None:
    library = Recorded("remap-pending")
    library.rounds = library.rounds[:2]
    told = Told(tmp_path, Nvml(library))

    told.look(4 * ONCE)

    (fact,) = told.facts
    assert isinstance(fact, NodeAiling)
    assert fact.unread == ()
    assert [(s.name, s.device, s.serial, s.drain) for s in fact.symptoms] == [
        ("gpu-ecc", ADDRESSES[0], UUIDS[0], True),
        ("gpu-remap-pending", ADDRESSES[0], UUIDS[0], True),
    ]


def test_a_gpu_that_is_lost_makes_its_node_unusable_once_and_names_it(tmp_path: Path) -> None:
    library = Recorded("lost")
    told = Told(tmp_path, Nvml(library))

    told.look(3 * ONCE)

    (unusable,) = (fact for fact in told.facts if isinstance(fact, NodeUnusable))
    assert unusable.serial == UUIDS[1]
    assert unusable.reason.startswith(f"gpu-lost of {ADDRESSES[1]}")
    before = len(library.calls)
    told.look(3 * ONCE)
    assert len(library.calls) == before, "nothing is asked after that"


def test_what_a_probe_lacks_is_told_apart_from_what_can_not_be_read(tmp_path: Path) -> None:
    told = Told(tmp_path, Smart(["sda"], str(tmp_path / "none")))

    told.look(ONCE)

    (fact,) = told.facts
    assert fact.unread == ()
    (why,) = fact.lacking
    assert why.startswith("smart: no disk is asked: there is no ")


def test_a_driver_that_hangs_keeps_nobody_waiting_and_is_told_of(tmp_path: Path) -> None:
    library = Recorded("well")
    library.hung.clear()
    told = Told(tmp_path, Nvml(library))

    told.look(int(WITHIN_S) + ONCE, patient=False)  # which would wait for a minute

    assert [fact.unread for fact in told.facts] == [("nvml: has not answered for 30 s",)]
    library.hung.set()
    told.look(ONCE)
    assert told.facts[-1] == NodeAiling(), "it has answered after all"


def test_a_probe_that_raises_is_switched_off_and_told_of_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = Recorded("remap-failed")
    told = Told(tmp_path, Raising(), Nvml(library))

    told.look(3 * ONCE)

    unread = "raising: switched off, it raised ZeroDivisionError: of no use"
    assert any(getattr(fact, "unread", ()) == (unread,) for fact in told.facts)
    assert caplog.text.count("probe raising is switched off") == 1


class BothLost:
    """A probe of two GPUs that are gone at the same moment."""

    name = "both"
    every_s = OFTEN_S

    def look(self) -> Look:
        return Look(tuple(Reading("gpu", address, {"lost": 1.0}) for address in ADDRESSES))


def test_of_two_gpus_that_are_lost_at_once_the_one_that_is_told_of_is_blamed(
    tmp_path: Path,
) -> None:
    told = Told(tmp_path, BothLost())

    told.look(ONCE)

    (unusable,) = (fact for fact in told.facts if isinstance(fact, NodeUnusable))
    assert unusable.reason.startswith(f"gpu-lost of {ADDRESSES[0]}")
    assert unusable.serial == UUIDS[0]


def test_who_raises_on_what_was_read_is_off_and_told_of_and_the_node_beats_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("of no use")

    library = Recorded("remap-pending")
    library.rounds = library.rounds[:2]
    told = Told(tmp_path, Nvml(library))
    told.look(4 * ONCE)
    (before,) = told.facts
    monkeypatch.setattr(Judge, "symptoms", broken)

    told.look(3 * ONCE)

    why = "hardware: switched off, it raised ZeroDivisionError: of no use"
    assert told.facts[1:] == [msgspec.structs.replace(before, unread=(why,))]
    assert before.symptoms, "what held then may hold still"
    assert caplog.text.count("is not heard any more") == 1


def test_a_log_that_may_not_be_read_is_told_of(tmp_path: Path) -> None:
    told = Told(tmp_path, kernel_log=str(tmp_path / "none"))

    told.look(3)

    why = f"kernel's log: No such file or directory: {tmp_path / 'none'}"
    assert told.facts == [NodeAiling(unread=(why,))]


def test_nodes_that_share_a_kernel_tell_nothing_of_it(tmp_path: Path) -> None:
    library = Recorded("remap-pending")
    told = Told(tmp_path, Nvml(library), kernel_shared=True)

    told.look(3 * ONCE)

    assert told.facts == []


def test_an_agent_that_was_started_anew_says_what_is_over(tmp_path: Path) -> None:
    library = Recorded("well")
    told = Told(tmp_path, Nvml(library), incarnation=2)

    told.look(2 * ONCE)

    assert told.facts == [NodeAiling()]


def test_what_is_told_fits_into_a_message(tmp_path: Path) -> None:
    library = Recorded("hot")
    told = Told(tmp_path, Nvml(library))
    told.look(8 * ONCE)

    assert len(msgspec.json.encode(told.facts[-1])) < 2000
    assert [s.name for s in told.facts[-1].symptoms] == ["gpu-hot", "gpu-slowdown", "gpu-throttled"]


def test_a_table_that_is_damaged_by_now_is_told_of_and_ours_counts(tmp_path: Path) -> None:
    table = tmp_path / "signals.yaml"
    table.write_text("signals: [", encoding="utf-8")
    told = Told(tmp_path, Nvml(Recorded("remap-failed")), signals=str(table))

    told.look(3 * ONCE)

    assert told.facts[0].unread[0].startswith("table of signals: no table of signals: ")
    assert isinstance(told.facts[1], NodeUnusable)
