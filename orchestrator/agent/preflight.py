"""Computes what is known beforehand: whether a device that was convicted gets it right now.

That every answer is right shows little: tests miss more than half of the devices that corrupt
(AEGIS, SDCHunter, OSDI 2026). So who passes is on probation, and no more.

An agent has no torch, so a GPU is tested by a program of the trainer, which sees that GPU only.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Serial
from orchestrator.protocol.messages import Preflighted
from orchestrator.protocol.preflight import Came
from orchestrator.worker.golden import CASES, Case, wrong_answers

log = logging.getLogger(__name__)
START_S = 180.0
"""How long a program that imports torch and wakes a GPU may take beside what it was told to."""
TOLD_MAX = 500
"""Characters that are told of what a program complained of, the last ones."""
PROGRAM = (sys.executable, "-P", "-m", "trainer.preflight")


def preflight(
    devices: Sequence[Device],
    serials: Sequence[Serial],
    within_s: float,
    program: Sequence[str] = PROGRAM,
) -> Preflighted:
    """Have each device compute every case at every scale, again and again, for some time.

    Each is computed once at least, however little time there is, until one is wrong: the device
    that got it wrong is the only one that is told of then.

    Args:
        devices: of this node.
        serials: of those that are to compute.
        within_s: seconds, shared among them.
        program: tests a GPU, given its UUID and for how many seconds.
    """
    asked = tuple(serials)
    known = [device for device in devices if device.serial in asked]
    if not known:
        return Preflighted(serials=asked, compared=0, problem="none of them is here")
    compared = 0
    for device in sorted(known, key=lambda device: device.kind != "machine"):
        came = _tested(device, within_s / len(known), program)
        compared += came.compared
        if came.problem:
            words = f"{device.kind} {device.serial}: {came.problem}"
            return Preflighted(serials=asked, compared=compared, problem=words)
        if came.wrong:
            return Preflighted(serials=(device.serial,), compared=compared, wrong=came.wrong)
    return Preflighted(serials=asked, compared=compared)


def _tested(device: Device, within_s: float, program: Sequence[str]) -> Came:
    try:
        if device.kind == "machine":
            return _on_machine(within_s)
        return _on_gpu(device.serial, within_s, program)
    except Exception as error:
        # A node that never answers would be kept out for ever, and nobody would know why.
        log.exception("the test of %s %s", device.kind, device.serial)
        return Came(problem=f"its test raised {type(error).__name__}: {error}")


def _on_machine(within_s: float) -> Came:
    deadline = time.monotonic() + within_s
    compared = 0
    while True:
        for wrong in wrong_answers(CASES, product):
            compared += 1
            if wrong:
                return Came(compared=compared, wrong=wrong)
        if time.monotonic() >= deadline:
            return Came(compared=compared)


def product(case: Case, scale: int) -> npt.NDArray[np.floating]:
    """Return the product of a case, with its left factor scaled, as this processor computes it."""
    left, right = case.factors()
    dtype = np.dtype(case.name)
    scaled = left.astype(dtype) * dtype.type(2.0**scale)
    found: npt.NDArray[np.floating] = scaled @ right.astype(dtype)
    return found


def _on_gpu(serial: Serial, within_s: float, program: Sequence[str]) -> Came:
    limit_s = within_s + START_S
    try:
        done = subprocess.run(
            [*program, serial, f"{within_s:g}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Came(problem=f"its test has not ended within {limit_s:g} s")
    except OSError as error:
        return Came(problem=f"its test can not be started: {error}")
    try:
        # By what it says, not by its exit code, which whoever reaps orphans may have taken.
        return msgspec.json.decode(done.stdout.rstrip().rpartition(b"\n")[2], type=Came)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = done.stderr.decode("utf-8", "replace").strip()[-TOLD_MAX:]
        return Came(problem=f"its test ended without an answer: {said or 'it said nothing'}")
