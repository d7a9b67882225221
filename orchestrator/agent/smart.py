"""Reads what disks say of themselves (SMART), as smartmontools' `smartctl` puts it into JSON.

The files of the kernel (sysfs.py) tell of errors that somebody has met; a disk knows of its own end
before that. Asking takes a right and, of a disk that is failing, its time: a disk is asked once in
minutes, by a process that is ended if it does not answer, and whose output is read up to a limit.

Source: smartmontools, smartctl(8) of 7.3, options and exit status; NVM Express Base Specification
2.0, SMART / Health Information log (02h); of numbers of ATA attributes, smartctl's own names.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

import msgspec

from orchestrator.agent.signals import Look, NoDevicesError, Reading

ELSEWHERE = "/usr/sbin/smartctl"
"""Where smartctl is for those who do not search there: it is made for root."""
HINT = "hint: install smartmontools"
EVERY_S = 300.0
"""A disk that fails does so within hours or days, and one that is asked has to move its heads: an
assumption. smartd's own default is half an hour."""
ANSWER_S = 8.0
"""A sound disk answers within a tenth of a second, one that has to spin up within seconds."""
LOOK_S = 24.0
"""Of all disks; those that are left then are told of, and come first the next time."""
GRACE_S = 0.5
"""To end what did not answer in time. What can not be ended (state D) is not asked again before."""
OUTPUT_MAX = 1 << 20
"""Bytes. All that a disk says of itself takes a fiftieth of that."""
TEXT_MAX = 200
_CHUNK = 1 << 16
_DISK = re.compile(r"^(?:nvme[0-9]+n[0-9]+|sd[a-z]+)$")
"""Disks that may say something of themselves. One of a virtual machine (vda, xvda), a mapping, or
an array has nothing to say: what it is made of has."""

NOT_PARSED, NOT_OPENED, NOT_READ, PREFAIL = 0x1, 0x2, 0x4, 0x10
"""Bits of the exit status: the command line; the disk was not opened or sleeps; a command to it
failed; an attribute that foretells a failure is at its threshold."""
WARNINGS = (
    (0x01, "smart_spare_low"),
    (0x02, "smart_hot"),
    (0x04, "smart_unreliable"),
    (0x08, "smart_read_only"),
    (0x10, "smart_cache_unprotected"),
)
"""Bits of an NVMe disk's critical warning."""
ATTRIBUTES = {
    5: "smart_reallocated",
    187: "smart_uncorrected",
    197: "smart_pending",
    198: "smart_offline_uncorrectable",
}
"""Numbers of ATA attributes whose raw value counts sectors, or errors."""
COUNT_MAX = 2.0**63
_LEADING = re.compile(r"^[0-9]{1,15}(?![0-9])")


# What is said ---------------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True):
    string: str = ""


class _Said(msgspec.Struct, frozen=True):
    messages: list[_Message] = []


class _Status(msgspec.Struct, frozen=True):
    passed: bool | None = None


class _Nvme(msgspec.Struct, frozen=True):
    critical_warning: int
    available_spare: int
    available_spare_threshold: int
    percentage_used: int
    media_errors: int


class _Raw(msgspec.Struct, frozen=True):
    string: str


class _Attribute(msgspec.Struct, frozen=True):
    id: int
    raw: _Raw


class _Attributes(msgspec.Struct, frozen=True):
    table: list[_Attribute] = []


class _Answer(msgspec.Struct, frozen=True):
    smartctl: _Said
    smart_status: _Status | None = None
    nvme: _Nvme | None = msgspec.field(name="nvme_smart_health_information_log", default=None)
    ata: _Attributes | None = msgspec.field(name="ata_smart_attributes", default=None)
    scsi_grown_defect_list: int | None = None


_answer: msgspec.json.Decoder[_Answer] = msgspec.json.Decoder(_Answer)


class _Exit(NamedTuple):
    """How a process ended, and what it had said."""

    status: int
    said: bytes


class _UnreadError(Exception):
    """A disk that can not be read, and why."""


# The probe ------------------------------------------------------------------------------------


class Smart:
    """The disks of one node.

    Args:
        disks: of the node, by the kernel's name; those of others are of no interest.
        program: path of smartctl; "" to search for it.
        answer_s: seconds that a disk may take.
        look_s: seconds that all of them may take.
    """

    name = "smart"
    every_s = EVERY_S

    def __init__(
        self,
        disks: Collection[str],
        program: str = "",
        *,
        answer_s: float = ANSWER_S,
        look_s: float = LOOK_S,
    ) -> None:
        self._disks = sorted(disk for disk in disks if _DISK.match(disk))
        self._program = program or shutil.which("smartctl") or ELSEWHERE
        self._answer_s, self._look_s = answer_s, look_s
        self._asked = False
        """Whether there was a smartctl before: who installed it wants disks to be read."""
        self._left: dict[str, subprocess.Popen[bytes]] = {}
        """Processes that could not be ended, by disk."""

    def look(self) -> Look:
        """See `Probe.look`."""
        if not self._disks:
            raise NoDevicesError("no disk of this node tells of itself")
        until = time.monotonic() + self._look_s
        readings, unread, late = [], [], []
        for disk in self._disks:
            if time.monotonic() >= until:
                late.append(disk)
                unread.append(f"{disk}: not asked, others took {self._look_s:g} s")
                continue
            try:
                readings.append(Reading("disk", disk, self._ask(disk, until)))
            except FileNotFoundError:
                why = f"no disk is asked: there is no {self._program}; {HINT}"
                return Look(problem=why) if self._asked else Look(lacking=why)
            except OSError as error:
                unread.append(f"{disk}: smartctl can not be run: {error.strerror or error}")
            except _UnreadError as error:
                unread.append(f"{disk}: {error}")
        self._disks = [*late, *(disk for disk in self._disks if disk not in late)]
        return Look(tuple(readings), "; ".join(unread))

    def _ask(self, disk: str, until: float) -> dict[str, float]:
        """Return what a disk says of itself. Raises _UnreadError, or OSError."""
        before = self._left.pop(disk, None)
        if before is not None and before.poll() is None:
            self._left[disk] = before
            raise _UnreadError("the question before this one is not answered, and can not be ended")
        process = _start([self._program, "--json=c", "-H", "-A", f"/dev/{disk}"])
        self._asked = True
        try:
            ended = _read(process, min(time.monotonic() + self._answer_s, until))
        finally:
            if not _end(process):
                self._left[disk] = process
        return _gauges(ended)


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it has to say stands in its JSON
        start_new_session=True,
    )


def _read(process: subprocess.Popen[bytes], until: float) -> _Exit:
    """Return what a process says until it ends. Raises _UnreadError if it does not in time."""
    stdout = process.stdout
    assert stdout is not None
    ready = select.poll()
    ready.register(stdout, select.POLLIN)
    began, said, chunk = time.monotonic(), bytearray(), b"."
    while chunk:
        if not ready.poll(1000 * max(until - time.monotonic(), 0.0)):
            raise _UnreadError(f"smartctl has not answered for {time.monotonic() - began:.0f} s")
        chunk = os.read(stdout.fileno(), _CHUNK)
        said += chunk
        if len(said) > OUTPUT_MAX:
            raise _UnreadError(f"smartctl says more than {OUTPUT_MAX} bytes")
    try:
        return _Exit(process.wait(max(until - time.monotonic(), 0.001)), bytes(said))
    except subprocess.TimeoutExpired:
        raise _UnreadError("smartctl has answered, and does not end") from None


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End a process; return whether it has."""
    assert process.stdout is not None
    process.stdout.close()
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    return process.poll() is not None


# What it means --------------------------------------------------------------------------------


def _gauges(ended: _Exit) -> dict[str, float]:
    """Return the gauges in an answer. Raises _UnreadError if there are none."""
    try:
        answer = _answer.decode(ended.said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Before version 7 it knows no JSON, and says so in words.
        how = f"exit status {ended.status}, expected JSON of smartctl 7 or later"
        raise _UnreadError(f"the answer can not be read: {error}; {how}") from None
    if ended.status < 0 or ended.status & (NOT_PARSED | NOT_OPENED):
        raise _UnreadError(_why(answer, ended.status))
    values = _nvme(answer.nvme) if answer.nvme is not None else _others(answer, ended.status)
    if not values:
        raise _UnreadError(_why(answer, ended.status))
    return values


def _nvme(log: _Nvme) -> dict[str, float]:
    """Return the gauges of an NVMe disk, whose health is its critical warning, bit by bit."""
    values = {name: float(bool(log.critical_warning & bit)) for bit, name in WARNINGS}
    below = log.available_spare < log.available_spare_threshold
    values["smart_spare_low"] = max(values["smart_spare_low"], float(below))
    return values | _numbers(
        {"smart_used_percent": log.percentage_used, "smart_media_errors": log.media_errors}
    )


def _others(answer: _Answer, status: int) -> dict[str, float]:
    """Return the gauges of an ATA or SCSI disk, as far as it has them."""
    values: dict[str, float] = {}
    if answer.smart_status is not None and answer.smart_status.passed is not None:
        values["smart_failing"] = float(not answer.smart_status.passed)
    if answer.ata is not None:
        values["smart_prefail"] = float(bool(status & PREFAIL))
        values |= _numbers(_counted(answer.ata.table))
    if answer.scsi_grown_defect_list is not None:
        values |= _numbers({"smart_reallocated": answer.scsi_grown_defect_list})
    return values


def _counted(table: Iterable[_Attribute]) -> dict[str, int]:
    """Return what attributes count. Some makers put more into a raw value, after the count."""
    found = {}
    for attribute in table:
        name, count = ATTRIBUTES.get(attribute.id), _LEADING.match(attribute.raw.string)
        if name is not None and count is not None:
            found[name] = int(count[0])
    return found


def _numbers(counts: dict[str, int]) -> dict[str, float]:
    """Return counts as numbers, without those that can not be true."""
    return {name: float(count) for name, count in counts.items() if 0 <= count < COUNT_MAX}


def _why(answer: _Answer, status: int) -> str:
    """Return why an answer tells nothing, in smartctl's own words if it has some."""
    words = "; ".join(message.string for message in answer.smartctl.messages if message.string)
    if not words and status & NOT_READ:
        words = "a command to it failed"
    ending = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{words[:TEXT_MAX] or 'it says nothing of its health'} ({ending})"
