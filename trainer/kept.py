"""Remembers on each node which token files a source came to, for when the source is away."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainer.retrying import SourceUnavailableError
from trainer.tokens import Room, TokenFile, Tokens, open_file, write_whole


class Memory:
    """What this node found one source to be.

    Args:
        room: where token files are kept.
        parts: all that decides which files a source comes to, but for the source itself.
    """

    def __init__(self, room: Room, parts: Sequence[object]) -> None:
        key = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
        self._path = room.folder / f"found-{key[:32]}" if room.folder is not None else None

    @property
    def files(self) -> list[Path]:
        """What the source came to, if all of it is there."""
        if self._path is None or not self._path.exists():
            return []
        names = msgspec.json.decode(self._path.read_bytes(), type=list[str])
        files = [self._path.with_name(name) for name in names]
        return files if all(file.exists() for file in files) else []

    def keep(self, files: Sequence[TokenFile]) -> None:
        """Remember the files that the source came to, all of which are made."""
        names = msgspec.json.encode([file.name for file in files])
        path = self._path
        if path is not None and not (path.exists() and path.read_bytes() == names):
            write_whole(path, names)

    def recall(self, bos: int, error: SourceUnavailableError) -> list[Tokens]:
        """Return the tokens of a source that does not answer, and say in the log why.

        Raises:
            SourceUnavailableError: if this node does not have them; as given.
        """
        files = self.files
        if not files:
            raise error
        print(  # noqa: T201 - the rank's log
            f"data: going on with the tokens that this node has: {error}", file=sys.stderr
        )
        return [open_file(file, bos) for file in files]
