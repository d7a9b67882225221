"""Files that are whole or not there, whenever whoever writes them is interrupted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.cli.errors import CliError, Exit


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which is `path` once the block ends well, and nothing if not.

    Raises:
        OSError: if that is not possible. What was there before stays.
    """
    with _replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write(path: Path, data: bytes) -> None:
    """Write a file. Raises OSError as `writing` does."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def require_writable(path: Path) -> None:
    """Raise OSError if `write` could not write there now. What is there stays."""
    temporary = _beside(path)
    try:
        temporary.write_bytes(b"")
    finally:
        temporary.unlink(missing_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"a folder, expected a file: {path}")


def require_option(option: str, path: Path | None) -> None:
    """Refuse at once a file that could not be written at the end of long work.

    Args:
        option: which names it.
        path: None if it was not given.

    Raises:
        CliError: usage.
    """
    try:
        if path is not None:
            require_writable(path)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "choose a file in a folder that is there and can be written"
        raise CliError(f"{option} {path}: {why}", hint, Exit.USAGE) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = _beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
