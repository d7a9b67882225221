"""Makes folders that have their names only once all that is to be in them is there and synced."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a folder to write to, which takes its name when this ends well and is gone if not.

    What a process that was killed has left beside it, of the same name, is removed first.

    Raises:
        FileExistsError: if there is something of that name.
    """
    if out.is_symlink() or out.exists():
        raise FileExistsError(errno.EEXIST, "something is there already", str(out))
    unfinished = out.absolute().with_name(f".{out.name}.{os.getpid()}")
    _make(unfinished.parent)
    _sweep(unfinished.parent, out.name)
    unfinished.mkdir()
    try:
        with _held(unfinished):
            yield unfinished
            _sync(unfinished)
            _name(unfinished, out)
            _sync(unfinished.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _name(unfinished: Path, out: Path) -> None:
    try:
        unfinished.rename(out)
    except OSError as error:
        # Somebody else was faster; what may have been made of an empty folder is no matter.
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        raise FileExistsError(errno.EEXIST, "something is there already", str(out)) from None


def _make(folder: Path) -> None:
    """Make a folder and those that it is to be in, so that all of them outlast a power cut."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        _sync(one.parent)


def _sweep(parent: Path, name: str) -> None:
    """Remove the unfinished folders of this name that nobody writes to any more."""
    for path in parent.glob("." + glob.escape(name) + ".*"):
        if path.suffix[1:].isdecimal() and path.is_dir() and not path.is_symlink():
            with _held(path) as alone:
                if alone:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process, if nobody else does; yield whether it is held.

    A lock goes with its process; a process's number says nothing on another machine, or in another
    container. Where the file system has no such locks, nothing is held and nothing swept.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
