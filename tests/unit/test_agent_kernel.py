"""What follows from lines of the kernel's log, as they were recorded."""

import os
from pathlib import Path

import pytest

from orchestrator.agent.devices import Devices, Gpus, disks_of, gpus_of, own_devices
from orchestrator.agent.kernel import KernelLog
from orchestrator.agent.signals import BadTableError, Judge, read_table

OFF_THE_BUS = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has fallen off the bus."
PAGE_FAULT = "NVRM: Xid (PCI:0000:3b:00): 31, pid=4242, name=python, Ch 00000008, MMU Fault"
NVLINK = "NVRM: Xid (PCI:0000:86:00): 74, pid='<unknown>', NVLink: fatal error detected on link 3"
DOUBLE_BIT = "NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', Double Bit ECC Error"
UNCORRECTED = (
    "EDAC MC0: 1 UE memory read error on CPU_SrcID#0_Ha#0_Chan#1_DIMM#0 (channel:1 slot:0)"
)
CORRECTED = "EDAC MC0: 600 CE memory read error on CPU_SrcID#0_Ha#0_Chan#1_DIMM#0 (channel:1)"
OWN = Devices(frozenset({"0000:3b:00", "0000:86:00", "0000:87:00"}), frozenset({"nvme1n1"}))
DISK = "critical medium error, dev nvme1n1, sector 4096 op 0x0:(READ) flags 0x80700"


@pytest.fixture
def judge() -> Judge:
    return Judge(read_table(), OWN, shared=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OFF_THE_BUS, "xid 79 of 0000:3b:00: GPU has fallen off the bus"),
        (DOUBLE_BIT, "xid 48 of 0000:3b:00: double-bit ECC error"),
        (UNCORRECTED, "memory: memory error that could not be corrected"),
    ],
)
def test_one_line_is_enough_where_the_device_is_gone(judge: Judge, text: str, says: str) -> None:
    assert judge.hear(text, 1.0).startswith(f"{says}; the kernel says: ")


@pytest.mark.parametrize("text", [PAGE_FAULT, "usb 1-1: new device", "NVRM: Xid (PCI:1): 9999, x"])
def test_what_is_the_programs_own_or_in_no_table_takes_no_node_out(judge: Judge, text: str) -> None:
    assert [judge.hear(text, float(at)) for at in range(50)] == [""] * 50


def test_what_may_happen_once_counts_within_its_window_and_for_its_own_device(judge: Judge) -> None:
    other = NVLINK.replace("86:00", "87:00")
    told = [judge.hear(text, at) for text, at in ((NVLINK, 0.0), (other, 1.0), (NVLINK, 2.0))]
    assert told == ["", "", ""]
    assert judge.hear(NVLINK, 4000.0) == ""
    assert judge.hear(NVLINK, 4001.0) == ""
    assert "3 within 3600 s" in judge.hear(NVLINK, 4002.0)


def test_errors_that_were_corrected_are_counted_by_what_the_line_says(judge: Judge) -> None:
    assert judge.hear(CORRECTED, 1.0) == ""
    assert "1000 within 86400 s" in judge.hear(CORRECTED, 2.0)


def test_ten_errors_of_one_disk_take_the_node_out(judge: Judge) -> None:
    told = [judge.hear(DISK, float(at)) for at in range(10)]

    assert told[:9] == [""] * 9
    assert told[9].startswith("disk of nvme1n1: disk errors, 10 within 600 s")


@pytest.mark.parametrize(
    "text",
    [
        DISK.replace("medium", "target").replace("0x0:(READ)", "0x3:(DISCARD)"),
        DISK.replace("medium", "target").replace("0x0:(READ)", "0x9:(WRITE_ZEROES)"),
        DISK.replace("critical medium", "I/O").replace("nvme1n1", "sr0"),
        DISK.replace("critical medium", "I/O").replace("nvme1n1", "nbd0"),
        DISK.replace("nvme1n1", "nvme2n1"),
    ],
)
def test_what_no_disk_of_the_node_failed_to_read_or_write_takes_no_node_out(
    judge: Judge, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert [judge.hear(text, float(at)) for at in range(50)] == [""] * 50
    assert caplog.messages[0].startswith("hardware: disk")


def test_what_is_said_of_a_gpu_that_is_not_the_nodes_is_only_noted() -> None:
    judge = Judge(read_table(), Devices(gpus=frozenset({"0000:86:00"})), shared=False)

    assert judge.hear(OFF_THE_BUS, 1.0) == ""
    assert judge.hear(OFF_THE_BUS.replace("3b", "86"), 1.0) != ""


@pytest.mark.parametrize("text", [OFF_THE_BUS, UNCORRECTED])
def test_a_kernel_that_nodes_share_condemns_none_of_them(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Judge(read_table(), OWN, shared=True)

    assert [judge.hear(text, float(at)) for at in range(50)] == [""] * 50
    assert "only noted: a kernel that nodes share" in caplog.text


def test_a_part_of_a_gpu_is_the_gpu(judge: Judge) -> None:
    part = OFF_THE_BUS.replace("3b:00", "3b:00 GPU-I:05")
    assert judge.hear(part, 1.0).startswith("xid 79 of 0000:3b:00: ")


def test_links_that_fail_at_once_count_as_one(judge: Judge) -> None:
    assert [judge.hear(NVLINK, 1.0 + link / 100) for link in range(18)] == [""] * 18
    assert judge.hear(NVLINK, 3.0) == ""
    assert "3 within 3600 s" in judge.hear(NVLINK, 5.0)


def test_a_disk_of_the_node_is_what_its_folder_lies_on_and_what_that_is_made_of(
    tmp_path: Path,
) -> None:
    number = tmp_path.stat().st_dev
    crypt, whole = tmp_path / "dm-0", tmp_path / "nvme1n1"
    part = whole / "nvme1n1p2"
    part.mkdir(parents=True)
    (part / "partition").touch()
    (crypt / "slaves").mkdir(parents=True)
    (crypt / "slaves" / part.name).symlink_to(part)
    blocks = tmp_path / "block"
    blocks.mkdir()
    assert disks_of([tmp_path], blocks) == frozenset()

    (blocks / f"{os.major(number)}:{os.minor(number)}").symlink_to(crypt)
    assert disks_of([tmp_path], blocks) == {"dm-0", "nvme1n1"}


@pytest.mark.parametrize(
    ("ranks", "environ", "own"),
    [
        (2, {}, {"0000:3b:00", "0000:86:00"}),
        (1, {}, set()),
        (1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {"0000:3b:00"}),
        (1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,0"}, {"0000:86:00"}),
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}, {"0000:86:00"}),
        (2, {"CUDA_VISIBLE_DEVICES": "0,1"}, set()),
    ],
)
def test_a_gpu_is_the_nodes_if_it_is_known_that_a_rank_uses_it(
    tmp_path: Path, ranks: int, environ: dict[str, str], own: set[str]
) -> None:
    for address, uuid in (("0000:3B:00.0", "GPU-aa11"), ("0000:86:00.0", "GPU-bb22")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "information").write_text(f"Model: \t x\nGPU UUID: \t {uuid}\n")

    found = gpus_of(ranks, environ, tmp_path)

    assert {gpu.address for gpu in found.own} == own
    assert ("which of 2 GPUs" in found.problem) == (not own)
    assert gpus_of(ranks, environ, tmp_path / "none") == Gpus()
    devices = own_devices(found, [])
    assert all(devices.own("gpu", address) for address in own)


def test_whose_rank_computes_on_a_gpu_is_known_where_cuda_counts_as_the_bus_does(
    tmp_path: Path,
) -> None:
    for address, uuid in (("0000:3b:00.0", "GPU-aa11"), ("0000:86:00.0", "GPU-????????-????")):
        (tmp_path / address).mkdir()
        text = f"Model: \t\t NVIDIA H100\nIRQ: 1\nGPU UUID: \t {uuid}\n"
        (tmp_path / address / "information").write_text(text)

    by_bus = gpus_of(2, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, tmp_path)
    assert by_bus.ordered
    assert [gpu[:3] for gpu in by_bus.own] == [
        ("0000:3b:00", "GPU-aa11", "NVIDIA H100"),
        ("0000:86:00", "", "NVIDIA H100"),
    ]
    assert not gpus_of(2, {}, tmp_path).ordered


def test_the_table_says_of_each_entry_where_it_is_from() -> None:
    for signal in read_table():
        assert signal.source or signal.assumption, signal.name
        rules = signal.codes.values() or [signal.rule(None)]
        if any(rule and rule.action == "unusable" for rule in rules):
            assert signal.assumption, f"{signal.name}: no document says when a node is unusable"


def test_what_another_signal_explains_is_not_counted(judge: Judge) -> None:
    contained = DOUBLE_BIT.replace("48,", "94,")
    assert judge.hear(contained, 0.0) == ""
    assert judge.hear(DOUBLE_BIT, 1.0) != ""
    assert judge.hear(contained, 2.0) == ""
    assert judge.hear(contained, 4000.0) != ""


def test_lines_are_taken_from_now_on_and_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_text(f"3,1,100,-;{OFF_THE_BUS}\n")
    kernel = KernelLog(path, Judge(read_table(), OWN, shared=False))
    assert kernel.look() == ""

    with path.open("ab") as file:
        file.write(b" SUBSYSTEM=pci\n\xff\xfe no record\n3,x,y;z\n")
        file.write(f"3,2,200,-;{OFF_THE_BUS}\n".encode())
    assert "fallen off the bus" in kernel.look()


def test_a_code_that_is_no_number_says_nothing_and_the_next_line_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "signals.yaml"
    theirs.write_text(
        "signals: [{name: xid, pattern: 'Xid (?P<code>[^,]+),', assumption: ours, "
        "codes: {79: {action: unusable, text: gone}}}]"
    )
    judge = Judge(read_table(theirs), OWN, shared=False)

    assert judge.hear("Xid many, x", 1.0) == ""
    assert judge.hear(f"Xid {'9' * 5000}, x", 1.0) == ""
    assert caplog.text.count("left out") == 2
    assert judge.hear("Xid 79, x", 2.0).startswith("xid 79: gone")


def test_a_node_is_condemned_once(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    kernel = KernelLog(path, Judge(read_table(), OWN, shared=False))
    path.write_text(f"3,1,100,-;{OFF_THE_BUS}\n3,2,200,-;{DOUBLE_BIT}\n")
    assert kernel.look() != ""

    with path.open("a") as file:
        file.write(f"3,3,300,-;{DOUBLE_BIT}\n")
    assert kernel.look() == ""
    assert kernel.degraded == ""


def test_what_a_program_writes_into_the_kernels_log_condemns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    kernel = KernelLog(path, Judge(read_table(), OWN, shared=False))
    path.write_text(f"11,1,100,-;{OFF_THE_BUS}\n")

    assert kernel.look() == ""
    kernel.close()


def test_a_log_that_can_not_be_read_is_degraded_with_the_reason(tmp_path: Path) -> None:
    kernel = KernelLog(tmp_path / "none", Judge(read_table(), OWN, shared=False))

    assert kernel.degraded == f"No such file or directory: {tmp_path / 'none'}"
    assert kernel.look() == ""


def test_a_device_that_disappears_while_it_is_read_is_degraded(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    kernel = KernelLog(path, Judge(read_table(), OWN, shared=False))
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, kernel._file)  # a folder can not be read: what a device says that is gone
    os.close(folder)

    assert kernel.look() == ""
    assert kernel.degraded.startswith("Is a directory: ")


@pytest.mark.parametrize(
    "text",
    [
        "signals: [{name: x}]",
        "signals: [{name: x, pattern: '(', source: y}]",
        "{",
        "signals: [{name: x, pattern: y, source: z, codes: {7: {action: burn, text: t}}}]",
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "signals.yaml"
    path.write_text(text)

    with pytest.raises(BadTableError, match="no table of signals"):
        read_table(path)
