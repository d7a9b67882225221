"""Products that are known beforehand, to the bit, whatever computes them: what preflights compare.

Products of matrices of small whole numbers are exact in floating point, whatever the order in which
they are added up, so their digests are constants, the same on every sound processor. They are
scaled by powers of two, which changes no digit: faults depend on the range of what is computed.
The numbers come from a counter, with whole-number arithmetic, not from a generator of the library
under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

SCALES = (-40, -20, 0, 20, 40)
"""Powers of two by which the left factor is multiplied. Source: reference, D0."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FOLD = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(33)
_WHOLE_MAX = 15
"""Factors are whole numbers up to this: of 1024 products of two, the sum is below 2**24, so it is
exact in float32."""
_SMALL_MAX = 1
"""And up to this for bfloat16, which has whole numbers up to 256: as many products are exact."""


class Case(NamedTuple):
    """One product, and the xxh3-64 of its bytes at scale 1; of bfloat16 of the same in float32."""

    name: str
    shape: tuple[int, int, int]
    """Rows, inner, columns."""
    golden: str

    def factors(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return what is multiplied."""
        rows, inner, columns = self.shape
        most = _SMALL_MAX if self.name == "bfloat16" else _WHOLE_MAX
        left = whole(rows * inner, 1, most).reshape(rows, inner)
        return left, whole(inner * columns, 2, most).reshape(inner, columns)


CASES = (
    Case("float32", (64, 64, 64), "1eb748348cfdacb6"),
    Case("float32", (96, 1024, 48), "fadb49a306112e1d"),
    Case("float32", (1, 512, 257), "d72072b80c230b72"),
    Case("float64", (64, 64, 64), "aca448632308d60a"),
    Case("float64", (128, 256, 33), "524c7c1c43b51223"),
)
"""For any processor."""
GPU_CASES = (
    *CASES,
    Case("float32", (512, 1024, 512), "3c8aae0ca4cfe22c"),
    Case("bfloat16", (64, 64, 64), "005a163d371ca0ec"),
    Case("bfloat16", (512, 256, 512), "6c606b1083b0c164"),
    Case("bfloat16", (1, 256, 257), "73a640fc9ccb9c44"),
)
"""For GPUs, which have other units for bfloat16, and many of each."""


def wrong_answers(
    cases: tuple[Case, ...], product: Callable[[Case, int], npt.NDArray[np.floating]]
) -> Iterator[str]:
    """Yield for each case, at each scale, what is wrong with a product, "" if nothing is."""
    for case in cases:
        for scale in SCALES:
            found = digest(product(case, scale), scale)
            yield (
                f"a product of {case.shape} in {case.name}, scaled by 2**{scale}, has digest "
                f"{found}, expected {case.golden}"
                if found != case.golden
                else ""
            )


def digest(found: npt.NDArray[np.floating], scale: int) -> str:
    """Return the digest of a product as it would be at scale 1."""
    # A sum of nothing but zeros may be a negative one, by the order in which they are added up.
    exact = found * found.dtype.type(2.0**-scale) + found.dtype.type(0.0)
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(exact).tobytes())


def whole(count: int, stream: int, most: int = _WHOLE_MAX) -> npt.NDArray[np.int64]:
    """Return whole numbers of a stream, from -most to most, by hashing a counter."""
    counter = np.arange(count, dtype=np.uint64) + np.uint64(stream << 40)
    mixed = (counter + np.uint64(1)) * _MIX
    mixed = (mixed ^ (mixed >> _SHIFT)) * _FOLD
    mixed ^= mixed >> _SHIFT
    return (mixed % np.uint64(2 * most + 1)).astype(np.int64) - most
