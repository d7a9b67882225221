"""Whether shards of which each says what it misses make up whole tensors; storage/coverage.py."""

from __future__ import annotations

from collections.abc import Iterable

PRIME = 2**61 - 1
"""Numbers are taken modulo this."""


def missing(gaps: Iterable[int]) -> bool:
    """Return whether shards with these gaps lack something, or have some of it too often."""
    return sum(gaps) % PRIME != 0
