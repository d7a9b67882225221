"""What disks say of themselves, and what follows, of answers written down in smartctl's format.

A script stands for smartctl: it prints what is on record for a disk, and ends with its status.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent.devices import Devices
from orchestrator.agent.signals import Judge, Look, NoDevicesError, read_table
from orchestrator.agent.smart import EVERY_S, OUTPUT_MAX, Smart

RECORDED = Path(__file__).parents[1] / "recorded" / "smart"
NAMES = {"nvme": "nvme0n1", "ata": "sda", "scsi": "sdb"}
OWN = frozenset(NAMES.values())
SCRIPT = """#!/bin/sh
[ "$*" = "--json=c -H -A $4" ] || exit 1
cat "{root}/${{4##*/}}" || exit 2
exit "$(cat "{root}/${{4##*/}}.status")"
"""


def merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: merged(old.get(key), value) for key, value in new.items()}


def program(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


class Watched:
    """A recorded case that is read every five minutes, and judged by our table."""

    def __init__(self, root: Path, case: str = "well") -> None:
        self.root = root
        self.rounds = json.loads((RECORDED / "cases.json").read_text())[case]
        self.answers = {
            kind: json.loads((RECORDED / f"kind-{kind}.json").read_text()) for kind in NAMES
        }
        self.status = dict.fromkeys(NAMES, 0)
        self.probe = Smart([*OWN, "vda", "md0"], program(root / "smartctl", self.script()))
        self.judge = Judge(read_table(), Devices(disks=OWN), shared=False)
        self.at = 0.0
        self.look: Look = Look()

    def script(self) -> str:
        return SCRIPT.format(root=self.root)

    def turn(self, times: int = 1) -> str:
        """Read so often; return why the node is unusable, "" if it is not."""
        why = ""
        for _ in range(times):
            self.at += EVERY_S
            self.write(self.rounds.pop(0) if self.rounds else {})
            self.look = self.probe.look()
            for reading in self.look.readings:
                why = self.judge.read(reading, self.at) or why
        return why

    def write(self, news: dict[str, Any]) -> None:
        for attribute in self.answers["ata"]["ata_smart_attributes"]["table"]:
            text = news.get("attributes", {}).get(str(attribute["id"]))
            if text is not None:
                attribute["raw"]["string"] = text
        for kind, name in NAMES.items():
            self.answers[kind] = merged(self.answers[kind], news.get(kind, {}))
            self.status[kind] = news.get("status", {}).get(kind, self.status[kind])
            (self.root / name).write_text(json.dumps(self.answers[kind]), encoding="utf-8")
            (self.root / f"{name}.status").write_text(str(self.status[kind]), encoding="utf-8")

    def told(self) -> dict[tuple[str, str], str]:
        return {(s.name, s.device): s.action for s in self.judge.symptoms(self.at)}


def test_of_disks_that_are_well_everything_is_read_and_nothing_follows(tmp_path: Path) -> None:
    watched = Watched(tmp_path)

    assert watched.turn(3) == ""

    assert watched.told() == {}
    assert watched.look.problem == ""
    assert {reading.device: reading.values for reading in watched.look.readings} == {
        "nvme0n1": {
            "smart_spare_low": 0.0,
            "smart_hot": 0.0,
            "smart_unreliable": 0.0,
            "smart_read_only": 0.0,
            "smart_cache_unprotected": 0.0,
            "smart_used_percent": 12.0,
            "smart_media_errors": 0.0,
        },
        "sda": {
            "smart_failing": 0.0,
            "smart_prefail": 0.0,
            "smart_reallocated": 4.0,
            "smart_uncorrected": 0.0,
            "smart_pending": 0.0,
            "smart_offline_uncorrectable": 0.0,
        },
        "sdb": {"smart_failing": 0.0, "smart_reallocated": 56.0},
    }


def test_every_gauge_of_a_disk_in_the_table_is_one_that_is_read(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.turn()

    read = {gauge for reading in watched.look.readings for gauge in reading.values}
    assert {s.reads for s in read_table() if s.reads.startswith("smart_")} == read


@pytest.mark.parametrize(
    ("case", "rounds", "told"),
    [
        ("spare", 1, {("disk-spare", "nvme0n1"): "drain"}),
        ("spare-by-threshold", 2, {("disk-spare", "nvme0n1"): "drain"}),
        ("unreliable", 1, {("disk-unreliable", "nvme0n1"): "drain"}),
        ("hot", 1, {("disk-hot", "nvme0n1"): "report"}),
        ("hot", 2, {}),
        ("unprotected", 1, {("disk-cache", "nvme0n1"): "report"}),
        ("worn", 1, {("disk-worn", "nvme0n1"): "report"}),
        ("media", 1, {}),
        ("media", 2, {("disk-media", "nvme0n1"): "report"}),
        (
            "media-again",
            2,
            {("disk-media", "nvme0n1"): "report", ("disk-media-again", "nvme0n1"): "drain"},
        ),
        ("failing", 2, {("disk-failing", "sda"): "drain", ("disk-prefail", "sda"): "drain"}),
        ("prefail", 1, {("disk-prefail", "sda"): "drain"}),
        ("was-below", 2, {}),
        ("reallocated", 2, {("disk-reallocated", "sda"): "report"}),
        (
            "reallocated-again",
            2,
            {("disk-reallocated", "sda"): "report", ("disk-reallocated-again", "sda"): "drain"},
        ),
        ("uncorrected", 2, {("disk-uncorrected", "sda"): "report"}),
        (
            "uncorrected-again",
            2,
            {("disk-uncorrected", "sda"): "report", ("disk-uncorrected-again", "sda"): "drain"},
        ),
        ("pending", 2, {("disk-pending", "sda"): "report"}),
        ("pending", 3, {}),
        ("offline", 2, {("disk-offline", "sda"): "report"}),
        ("defects", 2, {("disk-reallocated", "sdb"): "report"}),
        ("sas-failing", 1, {("disk-failing", "sdb"): "drain"}),
    ],
)
def test_what_a_disk_foretells_is_told_and_drains_its_node_where_it_is_an_end(
    tmp_path: Path, case: str, rounds: int, told: dict[tuple[str, str], str]
) -> None:
    watched = Watched(tmp_path, case)

    assert watched.turn(rounds) == ""

    assert watched.told() == told
    assert watched.look.problem == ""


def test_a_disk_that_can_only_be_read_takes_its_node_out(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "read-only")

    assert watched.turn(2) == (
        "disk-read-only of nvme0n1: the disk can only be read any more; smart_read_only is 1"
    )


def missing(path: Path) -> str:
    return f"no disk is asked: there is no {path}; hint: install smartmontools"


def test_a_node_without_smartctl_lacks_it_which_is_no_problem(tmp_path: Path) -> None:
    look = Smart(OWN, str(tmp_path / "none")).look()

    assert look == Look(lacking=missing(tmp_path / "none"))


def test_a_smartctl_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.turn()
    (tmp_path / "smartctl").unlink()

    watched.turn()

    assert watched.look == Look(problem=missing(tmp_path / "smartctl"))


def test_a_smartctl_that_is_installed_later_is_made_use_of(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    (tmp_path / "smartctl").rename(tmp_path / "later")
    watched.turn()
    assert watched.look.lacking
    (tmp_path / "later").rename(tmp_path / "smartctl")

    watched.turn()

    assert not watched.look.lacking
    assert len(watched.look.readings) == len(OWN)


def test_a_smartctl_that_may_not_be_run_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "smartctl"
    path.touch(0o644)

    look = Smart(["sda"], str(path)).look()

    assert look == Look(problem="sda: smartctl can not be run: Permission denied")


def test_a_machine_whose_disks_have_nothing_to_say_is_asked_nothing() -> None:
    with pytest.raises(NoDevicesError, match="no disk of this node") as caught:
        Smart(["vda", "xvdb", "dm-0", "md127", "../../etc/passwd", "sda;reboot"]).look()

    assert not caught.value.missed


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        (
            '{"smartctl":{"messages":[{"string":"/dev/sda: Permission denied"}]}}',
            2,
            "/dev/sda: Permission denied (exit status 2)",
        ),
        ('{"smartctl":{"exit_status":4}}', 4, "a command to it failed (exit status 4)"),
        ('{"smartctl":{}}', 0, "it says nothing of its health (exit status 0)"),
        (
            "=======> UNRECOGNIZED OPTION: json=c",
            1,
            "the answer can not be read: JSON is malformed: invalid character (byte 0); exit",
        ),
        ("", 0, "the answer can not be read: Input data was truncated; "),
        ("\\377\\376", 0, "the answer can not be read: "),
        ('{"smartctl":{},"ata_smart_attributes":{"table":[{"id":5}]}}', 0, "the answer can not"),
        ('{"smartctl":{},"smart_status":{"passed":"no"}}', 0, "the answer can not be read: "),
        (
            '{"smartctl":{},"nvme_smart_health_information_log":{"critical_warning":0}}',
            0,
            "the answer can not be read: Object missing required field ",
        ),
    ],
)
def test_an_answer_that_says_nothing_is_a_problem_with_the_reason(
    tmp_path: Path, said: str, status: int, why: str
) -> None:
    script = f"#!/bin/sh\nprintf '{said}'\nexit {status}\n"

    look = Smart(["sda"], program(tmp_path / "smartctl", script)).look()

    assert look.readings == ()
    assert look.problem.startswith(f"sda: {why}")


def test_counts_that_can_not_be_true_are_left_out(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    log = {"percentage_used": -1, "media_errors": 2**63, "available_spare": 100}
    watched.rounds = [
        {
            "nvme": {"nvme_smart_health_information_log": log},
            "attributes": {"5": "-4", "187": "", "197": "none", "198": "9" * 400},
        }
    ]

    assert watched.turn() == ""

    values = {reading.device: reading.values for reading in watched.look.readings}
    assert "smart_used_percent" not in values["nvme0n1"]
    assert "smart_media_errors" not in values["nvme0n1"]
    assert values["sda"].keys() == {"smart_failing", "smart_prefail"}


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 60", "sda: smartctl has not answered for 0 s"),
        ("exec sleep 60 >&-", "sda: smartctl has answered, and does not end"),
        ("exec cat /dev/zero", f"sda: smartctl says more than {OUTPUT_MAX} bytes"),
        ("kill -9 $$", "sda: the answer can not be read: Input data was truncated; exit status -9"),
    ],
)
def test_a_smartctl_that_does_not_come_to_an_end_is_ended(
    tmp_path: Path, script: str, why: str
) -> None:
    smart = program(tmp_path / "smartctl", f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
    began = time.monotonic()

    look = Smart(["sda"], smart, answer_s=0.4).look()

    assert look.problem.startswith(why)
    assert time.monotonic() - began < 20.0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_answer_that_is_nested_too_deeply_is_a_problem(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.write_text('{"x":' + "[" * (OUTPUT_MAX // 2), encoding="utf-8")

    look = Smart(["sda"], program(tmp_path / "smartctl", f"#!/bin/sh\ncat {said}\n")).look()

    assert look.problem.startswith("sda: the answer can not be read: ")


def test_a_disk_that_does_not_answer_leaves_the_others_their_time_and_comes_last_next_time(
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path)
    watched.write({})
    slow = 'case "$4" in */nvme0n1) sleep 0.6;; esac\n'
    script = watched.script().replace("cat", slow + "cat", 1)
    smart = Smart(OWN, program(tmp_path / "slow", script), answer_s=0.5, look_s=0.5)

    first = smart.look()
    second = smart.look()

    assert first.readings == ()
    assert "sda: not asked, others took 0.5 s" in first.problem
    assert [reading.device for reading in second.readings] == ["sda", "sdb"]
    assert second.problem.startswith("nvme0n1: ")


def test_a_disk_that_is_gone_while_it_is_asked_leaves_the_others(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.turn()
    (tmp_path / "sda").unlink()
    look = watched.probe.look()

    assert [reading.device for reading in look.readings] == ["nvme0n1", "sdb"]
    assert look.problem.startswith("sda: the answer can not be read: ")
