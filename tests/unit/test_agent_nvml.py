"""What is read of GPUs, and what follows from it, of answers as they were recorded."""

import sys
from typing import Any

import pytest

from orchestrator.agent.devices import Devices
from orchestrator.agent.nvml import QUESTIONS, Nvml
from orchestrator.agent.signals import Judge, Look, NoDevicesError, Reading, read_table
from tests.gpus import ADDRESSES, NUMBERS, UUIDS, Recorded

FIRST, SECOND = ADDRESSES


class Watched:
    """A recorded case that is read once a minute, and judged by our table."""

    def __init__(self, case: str, *, events: bool = False) -> None:
        self.library = Recorded(case)
        self.nvml = Nvml(self.library, events=events)
        self.judge = Judge(read_table(), Devices(gpus=frozenset(ADDRESSES)), shared=False)
        self.at = 0.0
        self.look: Look = Look()

    def turn(self, times: int = 1) -> str:
        """Read so often; return why the node is unusable, "" if it is not."""
        why = ""
        for _ in range(times):
            self.at += 60.0
            self.look = self.nvml.look()
            for reading in self.look.readings:
                why = self.judge.read(reading, self.at) or why
        return why

    @property
    def first(self) -> Reading:
        return self.look.readings[0]

    def told(self) -> dict[tuple[str, str], str]:
        return {(s.name, s.device): s.action for s in self.judge.symptoms(self.at)}


def test_of_gpus_that_are_well_everything_is_read_and_nothing_follows() -> None:
    watched = Watched("well")

    assert watched.turn(3) == ""

    assert watched.told() == {}
    assert watched.look.problem == ""
    assert [reading.device for reading in watched.look.readings] == list(ADDRESSES)
    asked = {name for question in QUESTIONS for name in question.names}
    asked |= {"sram_worn", "recovery_action", "nvlinks_down", "nvlink_recoveries", "nvlink_replays"}
    retired = {"pages_pending", "pages_retired_single", "pages_retired_double"}
    assert asked - watched.first.values.keys() == retired, "which rows have taken the place of"
    assert all(watched.first.missing[gauge] == "Not Supported" for gauge in retired)
    assert watched.first.values["over_slowdown_c"] == 61 - 87


def test_every_gauge_of_a_gpu_in_the_table_is_one_that_is_read() -> None:
    read: set[str] = set()
    for case in ("well", "old", "lost", "reset-required"):
        watched = Watched(case)
        watched.turn(2)
        read = read.union(*(reading.values for reading in watched.look.readings))

    table = {signal.reads for signal in read_table() if signal.own == "gpu" and signal.reads}
    assert table <= read


@pytest.mark.parametrize(
    ("case", "rounds", "says"),
    [
        ("lost", 2, f"gpu-lost of {SECOND}: the GPU is lost; lost is 1"),
        ("reset-required", 2, f"gpu-reset-required of {SECOND}"),
        ("remap-failed", 2, f"gpu-remap-failed of {FIRST}"),
        ("sram", 2, f"gpu-ecc-sram of {SECOND}"),
        ("sram-worn", 1, f"gpu-sram-worn of {SECOND}"),
        (
            "ecc-twice",
            3,
            f"gpu-ecc-again of {FIRST}: memory errors could not be corrected, 2 ",
        ),
        ("advice", 2, f"gpu-advice 1 of {FIRST}: the driver wants all processes ended"),
    ],
)
def test_a_gpu_that_can_not_be_relied_on_takes_its_node_out_and_is_blamed(
    case: str, rounds: int, says: str
) -> None:
    watched = Watched(case)
    assert watched.turn(rounds - 1) == ""

    why = watched.turn()

    assert why.startswith(says)
    assert watched.judge.blamed[why] == ("gpu", FIRST if FIRST in says else SECOND)


def test_a_row_that_waits_for_a_reset_drains_its_node_until_it_was_reset() -> None:
    watched = Watched("remap-pending")
    watched.turn()

    assert watched.turn() == ""
    assert watched.told() == {
        ("gpu-ecc", FIRST): "drain",
        ("gpu-remap-pending", FIRST): "drain",
    }
    watched.turn()
    assert ("gpu-remap-pending", FIRST) not in watched.told()
    watched.at += 86_400.0
    assert watched.told() == {}


def test_an_older_gpu_says_of_pages_what_a_newer_one_says_of_rows() -> None:
    watched = Watched("old")
    watched.turn()
    assert watched.first.values["throttled_by_heat"] == 0.0, "asked by its older name"

    assert watched.turn() == ""

    assert watched.told() == {("gpu-pages-pending", FIRST): "drain"}
    assert watched.first.values["pages_retired_double"] == 1.0
    assert watched.first.missing["remap_pending"] == "Not Supported"


def test_what_is_not_supported_is_asked_once() -> None:
    watched = Watched("old")
    watched.turn(3)

    assert watched.library.calls.count("nvmlDeviceGetRemappedRows()") == len(ADDRESSES)
    assert watched.library.calls.count("nvmlDeviceGetTemperature(0)") == 3 * len(ADDRESSES)


def test_a_gpu_that_is_hot_for_a_minute_is_told_of_and_no_sooner_than_that() -> None:
    watched = Watched("hot")
    watched.turn()
    assert watched.told() == {}

    assert watched.turn() == ""

    told = watched.told()
    assert told.keys() == {(name, SECOND) for name in ("gpu-throttled", "gpu-slowdown", "gpu-hot")}
    assert set(told.values()) == {"report"}


def test_links_that_were_up_and_are_not_any_more_drain_a_node_and_slow_ones_are_told_of() -> None:
    watched = Watched("links")
    watched.turn()
    watched.turn(2)

    assert watched.told() == {
        ("gpu-nvlink-down", FIRST): "drain",
        ("gpu-nvlink-recoveries", FIRST): "report",
        ("gpu-pcie-lanes", SECOND): "report",
    }
    assert watched.first.values["nvlinks_down"] == 2.0


def test_what_only_root_may_ask_is_missing_with_the_reason_and_all_else_is_read() -> None:
    watched = Watched("denied")

    assert watched.turn() == ""

    assert watched.first.missing["sram_worn"] == "Insufficient Permissions"
    assert watched.first.missing["remap_failed"] == "Insufficient Permissions"
    assert watched.first.values["temperature_c"] == 61.0
    assert watched.look.readings[1].values["remap_failed"] == 0.0


def test_what_can_not_be_true_is_missing_with_the_reason_and_condemns_nobody() -> None:
    watched = Watched("garbage")

    assert watched.turn(3) == ""

    assert watched.told() == {}
    missing = watched.first.missing
    assert missing["ecc_uncorrected"] == "the answer is 1.84467e+19, expected 0 to 9.22337e+18"
    assert missing["temperature_c"] == "the answer is 4.29497e+09, expected 0 to 200"
    assert missing["remap_failed"] == "2 answers, expected 4"
    assert missing["pcie_replays"] == "the answer is 'none', no number"
    assert missing["nvlinks_down"] == "Unknown Error"
    assert missing["recovery_action"] == "the answer is -1, expected 0 to 255"
    assert "over_slowdown_c" not in watched.first.values
    assert watched.first.values["slowdown_c"] == 87.0


def test_a_gpu_that_disappears_while_it_is_asked_is_a_problem_with_a_reason() -> None:
    watched = Watched("lost")
    watched.turn()
    assert watched.look.problem == ""

    watched.turn()

    assert watched.look.problem == f"GPU {SECOND} does not answer: GPU is lost"
    assert watched.look.readings[1].values == {"lost": 1.0}
    assert "ecc_corrected" in watched.first.values, "the other one is read all the same"


def test_a_gpu_that_is_gone_before_it_was_ever_read_is_a_problem_too() -> None:
    watched = Watched("lost")
    watched.library.rounds.pop(0)

    watched.turn()

    assert watched.look.problem == "GPU number 1 can not be read: GPU is lost"
    assert [reading.device for reading in watched.look.readings] == [FIRST]


def test_a_driver_that_is_replaced_is_a_problem_until_it_answers_again() -> None:
    watched = Watched("driver-replaced")
    watched.turn()

    assert watched.turn() == ""
    assert "version mismatch" in watched.look.problem
    assert watched.look.readings == ()

    assert watched.turn() == ""
    assert (len(watched.look.readings), watched.look.problem) == (2, "")
    assert watched.library.calls.count("nvmlInit") == 2


def test_xids_are_taken_from_the_driver_if_the_kernels_log_is_not_to_be_had() -> None:
    deaf, listening = Watched("xids"), Watched("xids", events=True)
    assert deaf.turn(2) == ""

    assert listening.turn(2).startswith(f"xid 79 of {SECOND}: GPU has fallen off the bus")
    assert listening.first.codes == (("xid", 31),)


@pytest.mark.parametrize(
    ("number", "words"), [(12, "NVML Shared Library Not Found"), (9, "Driver Not Loaded")]
)
def test_a_machine_without_a_driver_has_no_gpus_unless_some_are_known(
    number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorded("well")

    def absent() -> None:
        raise library.NVMLError(number)

    monkeypatch.setattr(library, "nvmlInit", absent)

    with pytest.raises(NoDevicesError, match=f"no NVIDIA devices, because {words}") as none:
        Nvml(library).look()
    assert not none.value.missed
    with pytest.raises(NoDevicesError, match="none of 8 NVIDIA devices is read") as some:
        Nvml(library, expected=8).look()
    assert some.value.missed


def test_a_machine_without_the_package_is_told_what_to_install_if_it_has_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    with pytest.raises(NoDevicesError, match="hint: pip install 'holdfast\\[nvidia\\]'"):
        Nvml(expected=8).look()
    with pytest.raises(NoDevicesError, match="because nvidia-ml-py is not installed"):
        Nvml().boards()


def test_the_library_says_who_its_gpus_are_and_what_number_their_makers_gave_them() -> None:
    boards = Nvml(Recorded("well")).boards()

    assert [board.address for board in boards] == list(ADDRESSES)
    assert [board.uuid for board in boards] == list(UUIDS)
    assert [board.number for board in boards] == list(NUMBERS)
    assert {board.model for board in boards} == {"NVIDIA H100 80GB HBM3"}


def test_the_names_of_the_recorded_calls_are_those_of_the_library() -> None:
    library: Any = Recorded("well")

    with pytest.raises(AttributeError):
        _ = library.nvmlDeviceGetHappiness
