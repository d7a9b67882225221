"""Computes what is known beforehand: whether a machine that was convicted gets it right now.

Products of matrices of small whole numbers are exact in floating point, whatever the order in which
they are added up, so their digests are constants, the same on every sound processor. They are
scaled by powers of two, which changes no digit: faults depend on the range of what is computed.
The numbers come from a counter, with whole-number arithmetic, not from a generator of the library
under test.

That every answer is right shows little: tests miss more than half of the devices that corrupt
(AEGIS, SDCHunter, OSDI 2026). So who passes is on probation, and no more.

On the machine's processors only: an agent has no torch, so it has no test for GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Serial
from orchestrator.protocol.messages import Preflighted

SCALES = (-40, -20, 0, 20, 40)
"""Powers of two by which the left factor is multiplied. Source: reference, D0."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FOLD = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(33)
_WHOLE_MAX = 15
"""Factors are whole numbers up to this: of 1024 products of two, the sum is below 2**24, so it is
exact in float32."""


class Case(NamedTuple):
    """One product, and the xxh3-64 of its bytes at scale 1."""

    name: str
    shape: tuple[int, int, int]
    """Rows, inner, columns."""
    golden: str


CASES = (
    Case("float32", (64, 64, 64), "1eb748348cfdacb6"),
    Case("float32", (96, 1024, 48), "fadb49a306112e1d"),
    Case("float32", (1, 512, 257), "d72072b80c230b72"),
    Case("float64", (64, 64, 64), "aca448632308d60a"),
    Case("float64", (128, 256, 33), "524c7c1c43b51223"),
)


def preflight(devices: Sequence[Device], serials: Sequence[Serial], within_s: float) -> Preflighted:
    """Compute every case at every scale, again and again, until time is up or one is wrong.

    Each is computed once at least, however little time there is.
    """
    asked = tuple(serials)
    kinds = {device.kind for device in devices if device.serial in asked}
    if kinds != {"machine"}:
        problem = "there is no test for GPUs here" if "gpu" in kinds else "none of them is here"
        return Preflighted(serials=asked, compared=0, problem=problem)
    deadline = time.monotonic() + within_s
    compared = 0
    while True:
        for wrong in _answers():
            compared += 1
            if wrong:
                return Preflighted(serials=asked, compared=compared, wrong=wrong)
        if time.monotonic() >= deadline:
            return Preflighted(serials=asked, compared=compared)


def _answers() -> Iterator[str]:
    """Yield for each answer what is wrong with it, "" if nothing is."""
    for case in CASES:
        for scale in SCALES:
            found = digest(product(case, scale), scale)
            yield (
                f"a product of {case.shape} in {case.name}, scaled by 2**{scale}, has digest "
                f"{found}, expected {case.golden}"
                if found != case.golden
                else ""
            )


def product(case: Case, scale: int) -> npt.NDArray[np.floating]:
    """Return the product of a case, with its left factor scaled."""
    rows, inner, columns = case.shape
    dtype = np.dtype(case.name)
    left = whole(rows * inner, 1).reshape(rows, inner).astype(dtype)
    right = whole(inner * columns, 2).reshape(inner, columns).astype(dtype)
    found: npt.NDArray[np.floating] = (left * dtype.type(2.0**scale)) @ right
    return found


def digest(found: npt.NDArray[np.floating], scale: int) -> str:
    """Return the digest of a product as it would be at scale 1."""
    # A sum of nothing but zeros may be a negative one, by the order in which they are added up.
    exact = found * found.dtype.type(2.0**-scale) + found.dtype.type(0.0)
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(exact).tobytes())


def whole(count: int, stream: int) -> npt.NDArray[np.int64]:
    """Return whole numbers of a stream, from -15 to 15, by hashing a counter."""
    counter = np.arange(count, dtype=np.uint64) + np.uint64(stream << 40)
    mixed = (counter + np.uint64(1)) * _MIX
    mixed = (mixed ^ (mixed >> _SHIFT)) * _FOLD
    mixed ^= mixed >> _SHIFT
    return (mixed % np.uint64(2 * _WHOLE_MAX + 1)).astype(np.int64) - _WHOLE_MAX
