"""Tells what was decided about a checkpoint after its commit: how far it is trusted, what bars it.

Verdicts are only ever added, numbered in the order in which they came. What a checkpoint's standing
is follows from their kinds, which are in their keys: one listing tells it of all checkpoints, and a
damaged verdict still counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from storage.blob import BlobStore, get_small
from storage.errors import BlobExistsError, BlobNotFoundError, StorageError, StorageUnavailableError
from storage.manifest import VERDICTS, parse_verdict_key, verdict_key

Where = tuple[int, int]
"""Step and epoch of a checkpoint."""

SUSPECT = "suspect"
QUARANTINED = "quarantined"
RELEASED = "released"
DELETING = "deleting"

VERDICT_BYTES_MAX = 1 << 20
_ATTEMPTS = 16


class Trust(IntEnum):
    """How far a checkpoint is trusted; each level includes those below it."""

    WRITTEN = 0
    """It was committed: every shard was verified against its staged bytes before it was sent."""
    BYTES_VERIFIED = 1
    """Every byte was read back from the store and is what was staged."""
    STATE_VERIFIED = 2
    """The state is plausible: finite, in step with itself, not the one before it once more."""
    COMPUTE_VERIFIED = 3
    """What computed it was found to compute right after it, and nothing was found wrong before."""

    @property
    def kind(self) -> str:
        """The kind of verdict that says so."""
        return self.name.lower().replace("_", "-")

    @property
    def words(self) -> str:
        """The level in words."""
        return self.name.lower().replace("_", " ")


_LEVELS = {level.kind: level for level in Trust if level is not Trust.WRITTEN}
KINDS = (*_LEVELS, SUSPECT, QUARANTINED, RELEASED, DELETING)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a checkpoint after its commit, and why, in words for an operator."""

    step: int
    epoch: int
    kind: str
    reason: str


# As in storage/shard.py: made before there are threads.
_read = msgspec.json.Decoder(Verdict).decode


@dataclass(frozen=True, slots=True)
class Standing:
    """What follows from all verdicts about a checkpoint.

    Attributes:
        trust: the highest level that was ever found.
        barred: key of the verdict that keeps it from being resumed from; empty if none does.
        keys: of all verdicts, oldest first.
    """

    trust: Trust = Trust.WRITTEN
    barred: str = ""
    keys: tuple[str, ...] = ()

    @property
    def read_back(self) -> bool:
        """Whether every byte was read back: of a higher level it need not have been."""
        return any(
            found is not None and found[2] == Trust.BYTES_VERIFIED.kind
            for found in map(parse_verdict_key, self.keys)
        )

    @property
    def kind(self) -> str:
        """The kind of the verdict that bars it; empty if none does."""
        found = parse_verdict_key(self.barred)
        return found[2] if found else ""


def standings(store: BlobStore) -> dict[Where, Standing]:
    """Return the standing of every checkpoint about which there is a verdict. One listing."""
    by_where: dict[Where, list[str]] = {}
    for key in store.keys(VERDICTS):
        found = parse_verdict_key(key)
        if found is not None:
            by_where.setdefault((found[0], found[1]), []).append(key)
    return {where: _standing(keys) for where, keys in by_where.items()}


def standing_of(store: BlobStore, step: int, epoch: int) -> Standing:
    """Return the standing of one checkpoint."""
    return _standing(
        key for key in store.keys(f"{VERDICTS}{step}-{epoch}/") if parse_verdict_key(key)
    )


def add(store: BlobStore, step: int, epoch: int, kind: str, reason: str) -> str:
    """Add a verdict after those that are there, and return its key.

    Raises:
        ValueError: if there is no such kind.
        StorageUnavailableError: if others add verdicts all the time.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    data = msgspec.json.encode(Verdict(step=step, epoch=epoch, kind=kind, reason=reason))
    keys = standing_of(store, step, epoch).keys
    taken = max((int(key.rpartition("/")[2][:6]) + 1 for key in keys), default=0)
    for number in range(taken, taken + _ATTEMPTS):
        key = verdict_key(step, epoch, number, kind)
        if parse_verdict_key(key) is None:
            break
        try:
            store.put(key, data)
        except BlobExistsError:
            continue
        # Another kind may have taken the same number: their keys differ.
        return key
    raise StorageUnavailableError(
        f"no free number for a verdict in {_ATTEMPTS} attempts: step {step}"
    )


def reason_of(store: BlobStore, key: str) -> str:
    """Return the kind of a verdict and its reason; of a damaged one, that it can not be read.

    Raises:
        StorageUnavailableError: if the store does not answer.
    """
    try:
        data = get_small(store, key, VERDICT_BYTES_MAX)
        verdict = _read(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, BlobNotFoundError):
        return f"barred, and the verdict is unreadable: {key}"
    except StorageError as error:
        if error.retryable:
            raise
        return f"barred, and the verdict is unreadable ({error}): {key}"
    return f"{verdict.kind}: {verdict.reason}"


def _rank(key: str) -> tuple[str, bool, str]:
    number, _, kind = key.rpartition("/")[2].partition("-")
    return number, kind != f"{RELEASED}.json", kind


def _standing(keys: Iterable[str]) -> Standing:
    """Go through the verdicts of one checkpoint in order.

    A release undoes suspicion and quarantine that came before it. It does not bring back what is
    being deleted. A kind that is unknown bars: a newer program had something against it. Of two
    with one number neither came first: who released did not see what the other had against it.
    """
    trust, barred, deleting = Trust.WRITTEN, "", ""
    ordered = sorted(keys, key=_rank)
    for key in ordered:
        found = parse_verdict_key(key)
        assert found is not None
        kind = found[2]
        if kind in _LEVELS:
            trust = max(trust, _LEVELS[kind])
        elif kind == RELEASED:
            barred = ""
        elif kind == DELETING:
            deleting = key
        else:
            barred = key
    return Standing(trust, deleting or barred, tuple(ordered))
