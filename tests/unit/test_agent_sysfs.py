"""What is read of memory, ports, disks and processors, in files as the kernel shows them."""

from pathlib import Path

import pytest

from orchestrator.agent.devices import Devices
from orchestrator.agent.signals import Judge, Look, NoDevicesError, read_table
from orchestrator.agent.sysfs import Sysfs

FILES = {
    "devices/system/edac/mc/mc0/ue_count": "0",
    "devices/system/edac/mc/mc0/ce_count": "12",
    "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
    "class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
    "class/infiniband/mlx5_0/ports/1/counters/link_downed": "0",
    "class/infiniband/mlx5_0/ports/1/counters/link_error_recovery": "0",
    "class/infiniband/mlx5_0/ports/1/counters/symbol_error": "0",
    "class/infiniband/mlx5_1/ports/1/state": "1: DOWN",
    "class/infiniband/mlx5_1/ports/1/rate": "10 Gb/sec (4X SDR)",
    "class/net/eth0/operstate": "up",
    "class/net/eth0/device/vendor": "0x15b3",
    "class/net/eth0/carrier_down_count": "1",
    "class/net/docker0/operstate": "down",
    "block/sda/device/ioerr_cnt": "0x2",
    "block/nvme0n1/device/state": "live",
    "fs/ext4/nvme0n1p2/errors_count": "0",
    "devices/system/cpu/cpu0/topology/physical_package_id": "0",
    "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "5",
    "devices/system/cpu/cpu1/topology/physical_package_id": "0",
    "devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "5",
}
OWN = frozenset({"sda", "nvme0n1"})


class Machine:
    """Files of a machine, read once a minute and judged by our table."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.at = 0.0
        for name, text in FILES.items():
            self.write(name, text)
        self.probe = Sysfs(OWN, root)
        self.judge = Judge(read_table(), Devices(disks=OWN), shared=False)
        self.look = Look()

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")

    def turn(self, times: int = 1) -> str:
        why = ""
        for _ in range(times):
            self.at += 60.0
            self.look = self.probe.look()
            for reading in self.look.readings:
                why = self.judge.read(reading, self.at) or why
        return why

    def told(self) -> list[tuple[str, str]]:
        return [(symptom.name, symptom.device) for symptom in self.judge.symptoms(self.at)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    assert machine.turn(2) == ""
    assert machine.told() == []
    return machine


def test_of_a_machine_that_is_well_everything_is_read_and_nothing_follows(
    machine: Machine,
) -> None:
    values = {(r.kind, r.device): r.values for r in machine.look.readings}

    assert machine.look.problem == ""
    assert values == {
        ("memory", "mc0"): {"memory_uncorrected": 0.0, "memory_corrected": 12.0},
        ("nic", "mlx5_0/1"): {
            "link_down": 0.0,
            "rate_missing_gbps": 0.0,
            "link_losses": 0.0,
            "link_recoveries": 0.0,
            "symbol_errors": 0.0,
        },
        ("nic", "mlx5_1/1"): {"link_down": 0.0, "rate_missing_gbps": 0.0},
        ("nic", "eth0"): {"link_down": 0.0, "link_losses": 1.0},
        ("disk", "sda"): {"disk_errors": 2.0},
        ("disk", "nvme0n1"): {"disk_dead": 0.0, "filesystem_errors": 0.0},
        ("cpu", "package0"): {"cpu_throttles": 5.0},
    }


def test_every_gauge_of_the_table_that_is_no_gpus_is_one_that_is_read(machine: Machine) -> None:
    read = {gauge for reading in machine.look.readings for gauge in reading.values}

    table = {signal.reads for signal in read_table() if signal.reads and signal.own != "gpu"}
    table = {gauge for gauge in table if not gauge.startswith("smart_")}  # disks say that
    assert table - read == {"nic_gone", "disk_gone"}, "which follow from what was there"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("devices/system/edac/mc/mc0/ue_count", "1", "edac-uncorrected of mc0: "),
        ("devices/system/edac/mc/mc0/ce_count", "1012", "edac-corrected of mc0: "),
        ("block/sda/device/ioerr_cnt", "0xc", "disk-counted of sda: disk errors, 10 within 600 s"),
        ("block/nvme0n1/device/state", "dead", "disk-dead of nvme0n1: "),
    ],
)
def test_memory_or_a_disk_that_can_not_be_relied_on_takes_its_node_out(
    machine: Machine, name: str, text: str, says: str
) -> None:
    machine.write(name, text)

    assert machine.turn().startswith(says)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("class/infiniband/mlx5_0/ports/1/state", "1: DOWN", ("nic-down", "mlx5_0/1")),
        ("class/infiniband/mlx5_0/ports/1/rate", "100 Gb/sec (1X NDR)", ("nic-slow", "mlx5_0/1")),
        (
            "class/infiniband/mlx5_0/ports/1/counters/link_downed",
            "3",
            ("nic-flapping", "mlx5_0/1"),
        ),
        (
            "class/infiniband/mlx5_0/ports/1/counters/symbol_error",
            "100",
            ("nic-symbols", "mlx5_0/1"),
        ),
        ("class/net/eth0/operstate", "down", ("nic-down", "eth0")),
        ("fs/ext4/nvme0n1p2/errors_count", "1", ("filesystem", "nvme0n1")),
        (
            "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count",
            "15",
            ("cpu-throttled", "package0"),
        ),
    ],
)
def test_what_a_node_can_live_with_is_told_of(
    machine: Machine, name: str, text: str, told: tuple[str, str]
) -> None:
    machine.write(name, text)

    assert machine.turn(2) == ""

    assert machine.told() == [told]


def test_a_link_that_is_up_again_is_told_of_no_more(machine: Machine) -> None:
    machine.write("class/net/eth0/operstate", "down")
    machine.turn(2)
    machine.write("class/net/eth0/operstate", "up")
    machine.turn(2)

    assert machine.told() == []


def test_a_device_that_is_gone_is_a_problem_and_is_not_well(machine: Machine) -> None:
    folder = machine.root / "class/infiniband/mlx5_0"
    folder.rename(machine.root / "unplugged")

    assert machine.turn(2) == ""

    assert machine.told() == [("nic-gone", "mlx5_0/1")]
    assert machine.look.problem == "mlx5_0/1: no nic_gone: it was here, and is not any more"


def test_a_disk_of_the_node_that_is_gone_takes_it_out(machine: Machine) -> None:
    (machine.root / "block/sda/device/ioerr_cnt").unlink()

    assert machine.turn().startswith("disk-gone of sda: the disk is gone")


@pytest.mark.parametrize("text", ["", "many", "-1", "\x00\xff", "9" * 5000])
def test_what_is_no_number_is_a_problem_and_condemns_nobody(machine: Machine, text: str) -> None:
    for name in (
        "devices/system/edac/mc/mc0/ue_count",
        "class/infiniband/mlx5_0/ports/1/state",
        "class/infiniband/mlx5_0/ports/1/rate",
    ):
        machine.write(name, text)

    assert machine.turn(2) == ""

    assert machine.told() == []
    assert "mc0: no memory_uncorrected: " in machine.look.problem
    assert "mlx5_0/1: no link_down: " in machine.look.problem


def test_a_file_that_can_not_be_read_is_a_problem_with_the_reason(machine: Machine) -> None:
    path = machine.root / "devices/system/edac/mc/mc0/ue_count"
    path.unlink()
    path.mkdir()  # not even root can read that

    assert machine.turn() == ""
    assert machine.look.problem == "mc0: no memory_uncorrected: Is a directory"


def test_a_machine_that_counts_nothing_has_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(NoDevicesError, match="nothing is counted"):
        Sysfs([], tmp_path).look()
