"""What is made of what the hardware of a node says of itself, short of its end."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.core import symptoms
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import DrainCancelled, DrainRequested
from orchestrator.core.phases import RunPhase
from orchestrator.policy import lemons
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.protocol.ids import NodeId, Serial
from orchestrator.protocol.messages import NodeAiling, Symptom
from tests.conftest import Cluster
from tests.journals import holdfast, write

PENDING = Symptom(
    name="gpu-remap-pending",
    device="0000:3b:00",
    serial=Serial("GPU-1"),
    drain=True,
    words="gpu-remap-pending of 0000:3b:00: a row of memory is to be remapped",
)
HOT = Symptom(
    name="gpu-throttled",
    device="0000:3b:00",
    serial=Serial("GPU-1"),
    drain=False,
    words="gpu-throttled of 0000:3b:00: its clocks are held down since it is hot",
)


def ail(cluster: Any, node: str, *told: Symptom, unread: tuple[str, ...] = ()) -> Any:
    return cluster.after(0.1).say(node, NodeAiling(symptoms=told, unread=unread))


def training(cluster: Any) -> Any:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.train(2)
    return cluster


def world(cluster: Any) -> tuple[str, ...]:
    orders = [d for d in cluster.decisions if isinstance(d, StartGeneration)]
    return tuple(dict.fromkeys(orders[-1].seats))


def test_a_node_whose_gpu_waits_for_a_reset_is_swapped_when_that_costs_least(cluster: Any) -> None:
    training(cluster)
    assert not ail(cluster, "node-0", PENDING)
    assert world(cluster) == ("node-0", "node-1")

    cluster.train(2)
    cluster.hold(14)

    assert world(cluster) == ("node-2", "node-1")
    order = [d for d in cluster.decisions if isinstance(d, StartGeneration)][-1]
    assert "planned swap, node-2 in place of node-0 from step 14, 0 steps to do again" in (
        order.reason
    )
    assert f"asked for by its hardware: {PENDING.words}" in order.reason


def test_once_it_was_reset_the_node_may_be_used_again(cluster: Any) -> None:
    training(cluster)
    ail(cluster, "node-2", PENDING)
    assert cluster.state.spares() == ()

    ail(cluster, "node-2")

    assert cluster.state.spares() == ("node-2",)


def test_what_is_said_again_drains_no_node_that_a_person_has_uncordoned(cluster: Any) -> None:
    training(cluster)
    ail(cluster, "node-2", PENDING)
    cluster.tell(DrainCancelled(at=cluster.at(), nodes=(NodeId("node-2"),), by="ann"))

    ail(cluster, "node-2", PENDING, HOT)

    assert cluster.state.spares() == ("node-2",)


def test_what_a_person_drained_stays_so_when_its_hardware_is_well_again(cluster: Any) -> None:
    training(cluster)
    asked = DrainRequested(
        at=cluster.at(), nodes=(NodeId("node-2"),), by="ann", reason="DIMM", within_s=None
    )
    cluster.tell(asked)
    ail(cluster, "node-2", PENDING)

    ail(cluster, "node-2")

    assert cluster.state.spares() == ()
    assert cluster.state.drains[NodeId("node-2")].by == "ann"


def test_what_all_nodes_say_at_once_drains_one_of_them(cluster: Any) -> None:
    training(cluster)

    for node in ("node-0", "node-1", "node-2"):
        ail(cluster, node, PENDING)

    assert list(cluster.state.drains) == ["node-0"]


def test_a_node_that_is_hot_is_told_of_and_moves_nothing(cluster: Any) -> None:
    training(cluster)

    assert not ail(cluster, "node-0", HOT)

    assert cluster.state.drains == {}
    assert cluster.state.phase is RunPhase.TRAINING
    assert symptoms.words(cluster.state, NodeId("node-0")) == HOT.words


@pytest.mark.parametrize("first", ["hardware", "incident"])
def test_an_incident_has_what_the_hardware_of_its_nodes_says_whichever_comes_first(
    cluster: Any, first: str
) -> None:
    training(cluster)
    if first == "hardware":
        ail(cluster, "node-0", HOT)
        ail(cluster, "node-1", HOT)
    cluster.lose("node-0")
    if first == "incident":
        ail(cluster, "node-0", HOT)
        ail(cluster, "node-1", HOT)

    (incident,) = cluster.state.incidents
    said = [note.text for note in incident.timeline if note.text.startswith("hardware of")]
    assert said == [f"hardware of node-0: {HOT.words}"]


def test_nodes_and_incidents_are_described_with_what_their_hardware_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster: Any = training(Cluster())
    ail(cluster, "node-0", PENDING, HOT, unread=("nvml: GPU number 3 can not be read",))
    cluster.lose("node-0")
    write(cluster, tmp_path / "r")
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))

    node = holdfast("describe", "node", "node-0", "--run", str(tmp_path / "r")).stdout
    incident = holdfast("describe", "incident", "--run", str(tmp_path / "r")).stdout

    assert f"{PENDING.words}; to be swapped for a spare" in node
    assert f"{HOT.words}\n" in node
    assert "not all of it is read: nvml: GPU number 3 can not be read" in node
    assert f"hardware of node-0: {HOT.words}" in incident


def test_what_is_not_installed_on_a_node_is_described_and_does_not_count_as_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster: Any = training(Cluster())
    why = "smart: no disk is asked: there is no /usr/sbin/smartctl; hint: install smartmontools"
    cluster.after(0.1).say("node-0", NodeAiling(lacking=(why,)))
    write(cluster, tmp_path / "r")
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "home"))

    node = holdfast("describe", "node", "node-0", "--run", str(tmp_path / "r")).stdout

    assert f"degraded: {why}" in node
    assert cluster.state.nodes["node-0"].unread == ()


def test_a_node_that_is_drained_for_its_hardware_again_and_again_is_a_lemon(cluster: Any) -> None:
    training(cluster)
    for _ in range(lemons.LIMIT):
        assert lemons.retired(cluster.state) == frozenset()
        ail(cluster, "node-2", PENDING)
        ail(cluster, "node-2")

    assert lemons.retired(cluster.state) == {"node-2"}
    assert lemons.standing(cluster.state, NodeId("node-2")).startswith("retired: 3 failures")
    cluster.state.now += (lemons.WINDOW_DAYS + 1) * DAY_S
    assert lemons.retired(cluster.state) == frozenset()
