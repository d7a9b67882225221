r"""The device ledger as it is kept: verdicts about devices, only ever added, for all runs.

    verdicts/000000000007.json      `<xxh3-64 of the rest> <DeviceVerdict as JSON>\n`

It is a store like that of checkpoints (storage/FORMAT.md): a folder or a bucket, whose blobs are
there whole or not at all and never change. A verdict is put under the next number; who finds the
number taken reads what is there and takes the one behind it. So there is one order, whoever adds,
with no lock that somebody could die with, and a verdict whose name is there already is not added
once more, should its writer not know whether it was.
"""

from __future__ import annotations

import threading
from bisect import bisect
from typing import NamedTuple

import msgspec
import xxhash

from orchestrator.core.standing import DeviceVerdict, Record, fold, refusal
from orchestrator.protocol.ids import Serial
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import RunFolder, home
from storage.blob import BlobStore, get_small
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    BlobTooLargeError,
    StorageError,
    StorageUnavailableError,
    is_of_content,
)
from storage.parallel import each

VERDICTS = "verdicts/"
PROBES = f"{VERDICTS}probe-"
"""Blobs that are there for a moment, by whoever looks whether the store takes verdicts."""
DIGITS = 12
VERDICT_BYTES_MAX = 64 << 10
OF_ALL_RUNS = "@devices"
"""In `home()`. No run has such a name."""
_ATTEMPTS = 64
AT_ONCE = 256
"""Verdicts that are read before any of them counts."""
_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(DeviceVerdict).decode


class Damage(NamedTuple):
    """A verdict that is not what was put there."""

    key: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


def address(run: TrainingRun, folder: RunFolder) -> str:
    """Return where the ledger of a run is."""
    # First: what is broken on purpose tells nothing of a device, whatever the file says.
    if folder.plan_file.exists() or run.spec.campaign:
        return str(folder.devices)
    return run.spec.recovery.device_ledger or address_of_all_runs()


def address_of_all_runs() -> str:
    """Return where the ledger is that runs share whose files name none."""
    return str(home() / OF_ALL_RUNS)


class DeviceLedger:
    """Verdicts in a store. Any thread; whoever comes while the store hangs waits as well.

    Args:
        store: where they are.

    Attributes:
        verdicts: what was read so far, in order.
        damages: what is there, and is not what was put.
        unread: what the store has, and does not let be read; it is tried again each time.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.verdicts: list[DeviceVerdict] = []
        self.damages: list[Damage] = []
        self.unread: list[Damage] = []
        self._keys: list[str] = []
        """Of the verdicts."""
        self._ids: set[str] = set()
        """Of them, too: a fleet's ledger is read as a whole at the start of each run."""
        self._read: set[str] = set()
        self._next = 0

    def refresh(self) -> None:
        """Read what was added since the last call.

        Raises:
            StorageError: if the store does not say what there is.
        """
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        new = [
            key
            for key in self._store.keys(VERDICTS)
            if key not in self._read and not key.startswith(PROBES)
        ]
        # The same words for as long as it lasts, whatever the store says of it each time.
        before = {damage.key: damage for damage in self.unread}
        unread: list[Damage] = []
        # A bucket answers after a round trip each. In parts: what was read counts.
        for begin in range(0, len(new), AT_ONCE):
            keys = new[begin : begin + AT_ONCE]
            for key, found in zip(keys, each(self._get, keys), strict=True):
                if isinstance(found, StorageError):
                    unread.append(before.get(key) or Damage(key, str(found)))
                    self._go_behind(key)
                else:
                    self._enter(key, found)
        self.unread = unread

    def add(self, verdict: DeviceVerdict) -> None:
        """Add a verdict behind all others, if none of its name is there.

        Raises:
            ValueError: if nobody may give such a verdict.
            StorageError: if it is not there; or if that is not known, then add it once more.
        """
        if why := refusal(verdict):
            raise ValueError(why)
        data = written(verdict)
        with self._lock:
            for _ in range(_ATTEMPTS):
                self._refresh()
                if verdict.id in self._ids:
                    return
                try:
                    self._store.put(key_of(self._next), data)
                except BlobExistsError:
                    continue
                self._enter(key_of(self._next), verdict)
                return
        raise StorageUnavailableError(f"no free number in {_ATTEMPTS} attempts: {VERDICTS}")

    def records(self) -> dict[Serial, Record]:
        """Return what follows from the verdicts that were read, by device."""
        return fold(self.verdicts)

    def problem(self) -> str:
        """Say that some could not be read; "" if all could."""
        found = self.damages or self.unread
        if not found:
            return ""
        what = "is damaged" if self.damages else "can not be read as a whole"
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        return f"the device ledger {what}: {found[0]}{more}"

    def _enter(self, key: str, found: DeviceVerdict | Damage) -> None:
        if isinstance(found, Damage):
            self.damages.append(found)
        elif found.id not in self._ids:
            self._ids.add(found.id)
            # Nearly always the last place. One that could not be read before goes where it belongs.
            place = bisect(self._keys, key)
            self._keys.insert(place, key)
            self.verdicts.insert(place, found)
        self._read.add(key)
        self._go_behind(key)

    def _go_behind(self, key: str) -> None:
        number = key.removeprefix(VERDICTS).removesuffix(".json")
        # Whatever it is that lies there: what is added comes behind it.
        if number.isdecimal():
            self._next = max(self._next, int(number) + 1)

    def _get(self, key: str) -> DeviceVerdict | Damage | StorageError:
        try:
            return read(get_small(self._store, key, VERDICT_BYTES_MAX))
        except (ValueError, BlobNotFoundError, BlobTooLargeError) as error:
            return Damage(key, str(error))
        except StorageError as error:
            return Damage(key, str(error)) if is_of_content(error) else error


def key_of(number: int) -> str:
    """Return the key of a verdict by its place in the order."""
    return f"{VERDICTS}{number:0{DIGITS}}.json"


def written(verdict: DeviceVerdict) -> bytes:
    """Return a verdict as it is kept."""
    body = _encode(verdict)
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)


def read(data: bytes) -> DeviceVerdict:
    """Read a verdict as it is kept.

    Raises:
        ValueError: if these bytes are not what was written, or of another version.
    """
    checksum, _, rest = data.partition(b" ")
    body = rest.removesuffix(b"\n")
    found = xxhash.xxh3_64_hexdigest(body)
    if checksum.decode("ascii", "replace") != found or not data.endswith(b"\n"):
        raise ValueError(f"checksum is {found}, the file says {checksum[:16]!r}")
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"of another version: {error}") from error
