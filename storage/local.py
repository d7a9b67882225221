"""Keeps blobs as files below a folder, durably and without ever showing half a file.

A blob is written under a temporary name in its final folder, synced, and then linked to its final
name: linking fails if the name is taken, which makes `put` exclusive where a rename would replace.
"""

import errno
import fcntl
import itertools
import os
import re
import socket
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from storage.blob import LeftOver, validate_key, validate_prefix, validate_range
from storage.digest import Buffer, byte_view
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)

_TEMPORARY = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)-\d+")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.ENAMETOOLONG}
_FOLDER_ATTEMPTS = 16
_DIRECT_MIN = 16 * 1024 * 1024
_ALIGNMENT = 4096
"""Of memory, and of lengths, for writes past the page cache; no disk asks for more."""
_PIECE = 16 * 1024 * 1024

# One counter and one set for the whole process: two stores on one folder must not share names.
_numbers = itertools.count()
_in_flight: set[Path] = set()


class LocalStore:
    """A `BlobStore` of files below `root`, on a file system that has hard links.

    Args:
        root: folder; made when the first blob is put.
        before: called with the name of each file system operation before it is done, such as
            "sync file"; a test stops the writer there, as a kill would.
    """

    def __init__(self, root: Path, *, before: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self._before = before

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        path = self._path(key)
        with _translated(key):
            temporary, descriptor = self._create_temporary(path.parent)
            try:
                try:
                    self._write(descriptor, data)
                finally:
                    os.close(descriptor)
                self._before("link")
                os.link(temporary, path)
            except FileNotFoundError:
                raise StorageUnavailableError(f"temporary file was swept: {key}") from None
            except FileExistsError:
                temporary.unlink(missing_ok=True)
                # Whoever linked it may have been killed before the sync, and our caller may take
                # the blob that is there for its own.
                self._sync_folders(path.parent)
                raise
            except (OSError, KeyboardInterrupt):
                # Only the file system's refusals, and who sits at the terminal, are tidied up
                # after here. Whatever else stops the writer, a kill above all, leaves the file to
                # `sweep`.
                temporary.unlink(missing_ok=True)
                raise
            finally:
                _in_flight.discard(temporary)
            self._before("unlink temporary")
            # A sweep by another process may have been here first.
            temporary.unlink(missing_ok=True)
            self._sync_folders(path.parent)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        validate_range(start, length)
        with self._opened(key) as descriptor:
            return _read(descriptor, start, length)

    def get_into(self, key: str, start: int, buffer: memoryview) -> int:
        """See `ReadsInto.get_into`."""
        validate_range(start, None)
        with self._opened(key) as descriptor:
            done = _direct(
                lambda at, end: os.preadv(descriptor, [buffer[at:end]], start + at),
                descriptor,
                buffer,
                aligned=start % _ALIGNMENT == 0,
            )
            while done < len(buffer) and (
                count := os.preadv(descriptor, [buffer[done:]], start + done)
            ):
                done += count
            return done

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        with _translated(key):
            status = self._path(key).stat()
        if not stat.S_ISREG(status.st_mode):
            raise BlobNotFoundError(f"no blob: {key}")
        return status.st_size

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        folder = self.root / validate_prefix(prefix).rpartition("/")[0]
        with _translated(prefix):
            keys = [path.relative_to(self.root).as_posix() for path in _files(folder)]
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        path = self._path(key)
        with _translated(key):
            self._before("unlink")
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            self._sync_folder(path.parent)
        self._prune(path.parent)

    def sweep(self, *, gone_hosts: Collection[str] = ()) -> list[Path]:
        """Remove the temporary files of writers that are no more.

        A process can only judge the processes of its own host; files of other hosts stay, unless
        the caller knows that the host is gone.

        Args:
            gone_hosts: names of hosts on which no writer of this store is alive.

        Returns:
            The files removed, sorted.
        """
        removed = []
        for path in sorted(self.root.rglob(".tmp-*")):
            if _is_left_over(path, gone_hosts):
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def left_over(self, idle_s: float) -> list[LeftOver]:
        """Return the temporary files that nobody has written to for long, whoever made them.

        Good for where names of hosts and numbers of processes prove nothing, as in containers. A
        file that is made and removed at once tells what the file system's clock says.

        Args:
            idle_s: how long a file must not have been written to, seconds by that clock.

        Raises:
            StorageError: if the store does not answer or refuses.
        """
        with _translated(".tmp-*"):
            found = [p for p in sorted(self.root.rglob(".tmp-*")) if _TEMPORARY.fullmatch(p.name)]
            if not found:
                return []
            deadline = self._now() - idle_s
            old = [(path, status) for path in found if (status := _unfinished(path)) is not None]
            return [
                LeftOver(path.relative_to(self.root).as_posix(), status.st_size)
                for path, status in old
                if status.st_mtime < deadline
            ]

    def sweep_old(self, idle_s: float) -> list[LeftOver]:
        """Remove them; see `left_over`.

        A writer that stood still for so long and lives is told that its file was swept.
        """
        old = self.left_over(idle_s)
        with _translated(".tmp-*"):
            for each in old:
                (self.root / each.name).unlink(missing_ok=True)
        return old

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """Open a blob to read it, and close it again."""
        with _translated(key):
            # Opening a pipe that somebody left here would wait for a writer, for ever.
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise BlobNotFoundError(f"no blob: {key}")
                yield descriptor
            finally:
                os.close(descriptor)

    def _now(self) -> float:
        """Return what the clock says that stamps the files here; it need not be this host's."""
        temporary, descriptor = self._create_temporary(self.root)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            _in_flight.discard(temporary)

    def _path(self, key: str) -> Path:
        return self.root / validate_key(key)

    def _create_temporary(self, folder: Path) -> tuple[Path, int]:
        """Open a new file of ours in the folder, which is made if it is not there."""
        owner = f".tmp-{socket.gethostname()}-{os.getpid()}"
        for _ in range(_FOLDER_ATTEMPTS):
            path = folder / f"{owner}-{next(_numbers)}"
            # Marked before it exists, so that a sweep in another thread never takes it for a
            # left-over of an earlier process with our number.
            _in_flight.add(path)
            try:
                self._make_folder(folder)
                self._before("create temporary")
                return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except OSError as error:
                _in_flight.discard(path)
                # The name may be left over from a process that had our number, and a delete may be
                # pruning the folder just now. Both are over at a later attempt.
                if error.errno not in {errno.EEXIST, errno.ENOENT}:
                    raise
        raise StorageUnavailableError(f"no temporary file in {_FOLDER_ATTEMPTS} attempts: {folder}")

    def _write(self, descriptor: int, data: Buffer) -> None:
        view = byte_view(data)
        self._before("write")
        view = view[_direct(lambda at, end: os.write(descriptor, view[at:end]), descriptor, view) :]
        while len(view):
            # One call writes at most 2 GiB, and less on a disk that is nearly full.
            view = view[os.write(descriptor, view) :]
        self._before("sync file")
        os.fsync(descriptor)

    def _make_folder(self, folder: Path) -> None:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):
            self._before("make folder")
            parent.mkdir(exist_ok=True)
            # A new name is durable once the folder that holds it is synced.
            self._sync_folder(parent.parent)

    def _sync_folders(self, folder: Path) -> None:
        """Sync a folder and those above it: another writer may have made one and not synced yet."""
        for parent in (folder, *folder.parents):
            self._sync_folder(parent)
            if parent == self.root:
                return

    def _sync_folder(self, folder: Path) -> None:
        self._before("sync folder")
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return  # Pruned by a delete at the same time; there is no name left to make durable.
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _prune(self, folder: Path) -> None:
        """Remove folders that became empty, from below, but never the root."""
        for parent in (folder, *folder.parents):
            if parent == self.root:
                return
            try:
                parent.rmdir()
            except OSError:
                return


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn the file system's errors into ours, which say what the caller can do."""
    try:
        yield
    except FileExistsError:
        raise BlobExistsError(f"key is taken: {key}") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BlobNotFoundError(f"no blob: {key}") from None
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(f"no space left on the device: {key}") from error
        if error.errno in _REFUSED:
            raise StorageRefusedError(f"{error.strerror}: {key}") from error
        raise StorageUnavailableError(f"{error.strerror}: {key}") from error


def _direct(
    move: Callable[[int, int], int], descriptor: int, view: memoryview, *, aligned: bool = True
) -> int:
    """Write from, or read into, the start of a large view past the page cache; return the bytes.

    A copy there takes as much memory again, and a core to make it, of what is hardly read twice.
    What can not go this way is left to the caller: the end of it, memory or a place in the file
    that is not aligned, and all of it on a file system that knows no such way.
    """
    whole = len(view) // _ALIGNMENT * _ALIGNMENT
    if whole < _DIRECT_MIN or not aligned or np.frombuffer(view, np.uint8).ctypes.data % _ALIGNMENT:
        return 0
    flags, done = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole:
            end = min(done + _PIECE, whole)
            done += move(done, end)
            # What comes after a short piece is not aligned any more, or past the end.
            if done < end:
                break
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _read(descriptor: int, start: int, length: int | None) -> bytes:
    size = os.fstat(descriptor).st_size
    end = size if length is None else min(size, start + length)
    pieces = []
    while start < end:
        piece = os.pread(descriptor, end - start, start)
        if not piece:
            break
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the blobs below a folder; names that start with a dot are the store's own."""

    def fail(error: OSError) -> None:
        # A folder that is not there holds nothing. One that cannot be read must not look empty.
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _unfinished(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None  # its writer has just finished
    # A folder or a link of such a name is of nobody who writes here.
    return status if stat.S_ISREG(status.st_mode) else None


def _is_left_over(path: Path, gone_hosts: Collection[str]) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or _unfinished(path) is None:
        return False
    host, pid = match["host"], int(match["pid"])
    if host != socket.gethostname():
        return host in gone_hosts
    if pid == os.getpid():
        return path not in _in_flight
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
    return False
