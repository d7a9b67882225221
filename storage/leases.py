"""Lets a reader keep a checkpoint from being deleted for a while, whoever deletes.

A lease is a key with the time of its end in it. A reader first takes the lease and then looks
whether the checkpoint is being deleted; who deletes first says so and then looks for leases. So one
of the two sees the other, whatever the order, and gives way.
"""

import logging
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage import keys
from storage.blob import BlobStore
from storage.errors import StorageError
from storage.verdicts import Where

log = logging.getLogger(__name__)

LEASES = "leases/"
SKEW_S = 300.0
"""Clocks of two machines may differ by so much without harm."""
LEASE_S_MAX = 7 * 86_400.0
RENEWALS = 3
"""A lease that is kept is renewed so often before it would end: one or two may fail."""
_END_WITHIN_S = 10.0

_HOLDER = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Leases:
    """The leases in a store.

    Args:
        store: of the run.
        clock: seconds since 1970, as all machines that use the store have them, more or less.
    """

    def __init__(self, store: BlobStore, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    def take(self, step: int, epoch: int, holder: str, lasts_s: float) -> str:
        """Keep a checkpoint from being deleted; return the lease's key.

        Look at its standing afterwards: a deletion that was begun before goes on.

        Args:
            step: of the checkpoint.
            epoch: of the checkpoint.
            holder: who asks, for people: letters, digits and `._-`.
            lasts_s: seconds from now, up to a week. A holder that dies keeps it no longer.

        Raises:
            ValueError: if the holder's name can not be part of a key, or it lasts too long.
        """
        if not _HOLDER.fullmatch(holder) or not 0 < lasts_s <= LEASE_S_MAX:
            raise ValueError(
                f"holder is {holder!r} and lasts_s {lasts_s}, expected letters, digits and ._-, "
                f"and up to {LEASE_S_MAX:g}"
            )
        until = round(self._clock() + lasts_s)
        key = f"{LEASES}{step}-{epoch}/{until:012d}-{holder}-{secrets.token_hex(4)}"
        self._store.put(key, b"")
        return key

    def drop(self, key: str) -> None:
        """Give a lease back."""
        self._store.delete(key)

    @contextmanager
    def kept(self, step: int, epoch: int, holder: str, lasts_s: float) -> Iterator[None]:
        """Hold a lease while the block runs, however long that is, and give it back then.

        It is renewed by a thread. A store that does not answer ends no reading: the lease then ends
        by itself, `lasts_s` after it was renewed last, and so does one whose holder was killed.

        Raises:
            StorageError: if it can not be taken.
            ValueError: as `take`.
        """
        held, over = self.take(step, epoch, holder, lasts_s), threading.Event()

        def renew() -> None:
            nonlocal held
            while not over.wait(lasts_s / RENEWALS):
                try:
                    newer = self.take(step, epoch, holder, lasts_s)
                    former, held = held, newer
                    self.drop(former)
                except StorageError as error:
                    log.warning("lease of checkpoint %d@%d is not renewed: %s", step, epoch, error)

        renewing = threading.Thread(target=renew, name="holdfast-lease", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join(_END_WITHIN_S)
            try:
                self.drop(held)
            except StorageError as error:
                log.warning("lease is not given back and ends by itself: %s (%s)", held, error)

    def held(self, step: int, epoch: int) -> bool:
        """Return whether somebody has a lease that has not ended, by any clock that is sound."""
        return (step, epoch) in self._held(f"{LEASES}{step}-{epoch}/")

    def all_held(self) -> set[Where]:
        """Return every checkpoint that somebody has a lease of."""
        return self._held(LEASES)

    def tidy(self) -> list[str]:
        """Remove the leases that have ended; return their keys."""
        ended = [key for key in self._store.keys(LEASES) if self._over(key)]
        for key in ended:
            self._store.delete(key)
        return ended

    def _held(self, prefix: str) -> set[Where]:
        matches = [
            keys.LEASE.fullmatch(key) for key in self._store.keys(prefix) if not self._over(key)
        ]
        return {(int(match[1]), int(match[2])) for match in matches if match}

    def _over(self, key: str) -> bool:
        match = keys.LEASE.fullmatch(key)
        return match is not None and int(match[3]) + SKEW_S < self._clock()
