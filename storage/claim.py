"""Writes a generation that nobody else may write, and takes it back if it is not to be.

Shards without a commit are collected once a later commit refuses theirs for ever. Whoever knows at
once that there will be none need not leave them until then. That is safe for what is one's own
alone: the same bytes may have been put by two, and one of them have committed them.
"""

from collections.abc import Callable
from typing import TypeVar

from storage import parallel
from storage.blob import BlobStore
from storage.commit import commit
from storage.digest import Buffer
from storage.errors import (
    BlobExistsError,
    StaleEpochError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.manifest import Manifest, commit_key, generation_prefix

T = TypeVar("T")
UNDO_S = 30.0
"""How long taking back may last: somebody waits at a terminal."""


class Claimed:
    """A store as one writer of one generation sees it, who takes nobody's blobs for its own.

    Whoever put the first blob is the only one who gets any further. All others are refused at
    their first, so that everything below the prefix is the first one's.

    Args:
        inner: the store that does the work.
        step: of the generation.
        epoch: of the generation; one of which nothing was in the store.
    """

    def __init__(self, inner: BlobStore, step: int, epoch: int) -> None:
        self._store, self._where = inner, (step, epoch)
        self._ours = self._unsure = False
        self.get, self.size, self.keys, self.delete = (
            inner.get,
            inner.size,
            inner.keys,
            inner.delete,
        )

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`.

        Raises:
            StaleEpochError: instead of `BlobExistsError`, which whoever puts a shard takes for a
                sign that it has done so before.
        """
        self._unsure = not self._ours
        try:
            self._store.put(key, data)
        except BlobExistsError:
            self._unsure = False
            error = StaleEpochError(f"somebody else writes epoch {self._where[1]}: {key}")
            error.hint = "Begin anew when the other one is done; then it is of a newer epoch."
            raise error from None
        self._ours, self._unsure = True, False

    def unless_written(self, write: Callable[[], T], left: Callable[[str], object]) -> T:
        """Return what writing returns; take back what there is of it if it is broken off.

        Args:
            write: puts shards here.
            left: told in words what could not be taken back, if something could not.
        """
        try:
            return write()
        except (Exception, KeyboardInterrupt):
            self._take_back(left)
            raise

    def commit(self, manifest: Manifest, left: Callable[[str], object]) -> None:
        """Commit the generation, or take it back if it is sure that it was not committed.

        Who is stopped on the way, or gets no answer, can not know whether there is a checkpoint.

        Raises:
            StorageError: as `commit`.
        """
        try:
            commit(self._store, manifest, newest_epoch_known=self._where[1])
        except (StaleEpochError, StorageFullError, StorageRefusedError):
            self._take_back(left)
            raise
        except (Exception, KeyboardInterrupt):
            left(
                f"whether step {self._where[0]} was committed is not known; if it was not, its "
                f"shards stay until a collection after the next commit"
            )
            raise

    def _take_back(self, left: Callable[[str], object]) -> None:
        # A daemon does it: a store that hangs must not keep anybody from leaving.
        undone = parallel.begin(self._delete)
        try:
            undone.result(UNDO_S)
        except (StorageError, OSError, KeyboardInterrupt) as error:
            why = str(error) or type(error).__name__
            left(
                f"what was written of step {self._where[0]}, epoch {self._where[1]}, stays until a "
                f"collection after the next commit ({why}): {generation_prefix(*self._where)}"
            )

    def _delete(self) -> None:
        step, epoch = self._where
        found = self._store.keys(generation_prefix(step, epoch))
        if found and self._unsure:
            raise StorageUnavailableError("the first put was broken off, and may be another's")
        if self._ours and not self._store.keys(commit_key(step, epoch)):
            parallel.each(self._store.delete, found)
