"""Who a node is, as far as its machine lets that be known."""

from pathlib import Path

import pytest

from orchestrator.agent.devices import Gpu, Gpus
from orchestrator.agent.identity import Identity, blamed, identity
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import NodeId

UUIDS = ("GPU-6e1a0000-0000-0000-0000-000000000001", "GPU-6e1a0000-0000-0000-0000-000000000002")
TWO = tuple(Gpu(f"0000:{n}b:00", uuid, "NVIDIA H100") for n, uuid in enumerate(UUIDS))


def who(
    root: Path,
    gpus: Gpus = Gpus(),  # noqa: B008 - it can not change
    *,
    machine_id: str | None = None,
    serial: str | None = None,
    stated: str = "",
    shared: bool = False,
    node: str = "node-1",
) -> Identity:
    root.mkdir(exist_ok=True)
    files = {"machine-id": machine_id, "serial": serial, "model": "PowerEdge XE9680"}
    for name, text in files.items():
        if text is not None:
            (root / name).write_text(f"{text}\n", encoding="utf-8")
    config = AgentConfig(
        node=NodeId(node),
        incarnation=1,
        run="r",
        token="t",  # noqa: S106 - of a test
        controller_file="",
        entrypoint="",
        ranks=2,
        memory="",
        work="",
        logs="",
        kernel_shared=shared,
        serial=stated,
    )
    return identity(
        config,
        gpus,
        machine_id=root / "machine-id",
        dmi_serial=root / "serial",
        dmi_model=root / "model",
    )


ID = "3d1219c7c4c5404aaa1f6d2a48adfda4"


def test_a_machine_is_its_installed_id_which_is_not_shown_itself(tmp_path: Path) -> None:
    (device,) = who(tmp_path, machine_id=ID, serial="7XK2").devices

    assert (device.kind, device.source, device.model) == (
        "machine",
        "machine-id",
        "PowerEdge XE9680",
    )
    assert device.serial.startswith("machine-")
    assert ID[:8] not in device.serial
    assert who(tmp_path, machine_id=ID).devices == (device,), "the same at every start"


def test_another_id_is_another_machine(tmp_path: Path) -> None:
    one = who(tmp_path, machine_id=ID).devices
    assert who(tmp_path, machine_id=ID[::-1]).devices != one


@pytest.mark.parametrize("machine_id", [None, "", "uninitialized", "3d12"])
def test_without_an_id_it_is_the_makers_serial(tmp_path: Path, machine_id: str | None) -> None:
    (device,) = who(tmp_path, machine_id=machine_id, serial="7XK2 019").devices

    assert (device.serial, device.source) == ("dmi-7XK2-019", "dmi")


@pytest.mark.parametrize("serial", [None, "", "None", "To Be Filled By O.E.M.", "Default string"])
def test_what_is_not_known_is_left_out_with_the_reason(tmp_path: Path, serial: str | None) -> None:
    found = who(tmp_path, serial=serial)

    assert found.devices == ()
    assert "the machine's serial is not known" in found.unknown
    assert "spec.nodes.serials" in found.unknown


def test_what_is_stated_counts_more_than_what_an_image_may_have_copied(tmp_path: Path) -> None:
    (device,) = who(tmp_path, machine_id=ID, serial="7XK2", stated="rack7-u12").devices

    assert (device.serial, device.source) == ("rack7-u12", "stated")


def test_nodes_that_are_one_machine_are_that_machine_under_their_own_names(tmp_path: Path) -> None:
    (one,) = who(tmp_path, machine_id=ID, shared=True, node="node-0").devices
    (other,) = who(tmp_path, machine_id=ID, shared=True, node="node-1").devices
    (alone,) = who(tmp_path, machine_id=ID).devices

    assert one.serial == f"node-0@{alone.serial}"
    assert other.serial == f"node-1@{alone.serial}"
    assert who(tmp_path, stated="rack7-u12", shared=True).devices[0].serial == "rack7-u12"


def test_gpus_are_their_uuids_with_the_rank_that_computes_on_each(tmp_path: Path) -> None:
    _, one, two = who(tmp_path, Gpus(TWO, ordered=True), machine_id=ID).devices

    assert [(d.serial, d.kind, d.model, d.local_rank) for d in (one, two)] == [
        (UUIDS[0], "gpu", "NVIDIA H100", 0),
        (UUIDS[1], "gpu", "NVIDIA H100", 1),
    ]


def test_if_nobody_knows_whose_gpu_it_is_no_rank_is_guessed(tmp_path: Path) -> None:
    _, one, two = who(tmp_path, Gpus(TWO), machine_id=ID).devices

    assert (one.local_rank, two.local_rank) == (-1, -1)


def test_a_gpu_without_uuid_is_left_out_with_the_reason(tmp_path: Path) -> None:
    found = who(tmp_path, Gpus((TWO[0]._replace(uuid=""),), ordered=True), machine_id=ID)

    assert [device.kind for device in found.devices] == ["machine"]
    assert found.unknown == "the driver tells no UUID of GPU 0000:0b:00"


def test_what_the_kernel_blames_has_the_serial_of_the_gpu_or_of_the_machine(tmp_path: Path) -> None:
    gpus = Gpus(TWO, ordered=True)
    found = who(tmp_path, gpus, machine_id=ID)

    assert blamed(found, gpus, "gpu", "0000:1B:00.0") == UUIDS[1]
    assert blamed(found, gpus, "gpu", "0000:7f:00") == ""
    assert blamed(found, gpus, "disk", "nvme1n1") == found.devices[0].serial
    assert blamed(found, gpus, "", "") == found.devices[0].serial
    assert blamed(who(tmp_path / "none", gpus), gpus, "", "") == ""
