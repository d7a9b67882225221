"""Keeps the tokens of a source in files of 32-bit ids, which every rank of the node maps.

A large source has several, each of some of its files: processes of a node share the work, and what
is done stays done if they are ended. On each node only the first to ask for a file makes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.worker import MisconfiguredError
from trainer.joined import NOTHING, Ids, Joined
from trainer.text import BAD_SHOWN, FileAccount, Text, no_text
from trainer.tokenizer import PIECE_CHARS_MAX, Tokenizer

_HEAD = struct.Struct("<8sQ16sQQ")
_MAGIC = b"HFTOK\x00\x00\x02"
_HEAD_BYTES = 64
_ID_BYTES = 4
_CHUNK_BYTES = 4 << 20
"""So much is written at once, after a look at whether there is room for it."""
_BYTES_PER_TOKEN = 8
"""Of text, more than what any vocabulary comes to; half its bytes are the least it will take."""
PART_BYTES = 256 << 20
"""Of text, which is tokenised in a minute or two: what a process loses that is ended meanwhile."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a source's documents."""

    files: tuple[FileAccount, ...] = ()
    held: int = 0
    """Documents that are held back for evaluation."""
    bad_shown: tuple[str, ...] = ()
    """The first records that were skipped: where, and what is wrong with them."""


class Tokens(NamedTuple):
    """All tokens of a source, one document after the other, each begun by `bos`."""

    ids: Ids
    digest: str
    """Of the ids; equal texts have equal digests, wherever they come from."""
    bos: int
    held: Ids = NOTHING
    """Of the documents that are never trained on."""
    name: str = ""
    """What the run file calls the source; "" for the only one."""
    weight: float = 1.0
    account: Account = Account()


class Room(NamedTuple):
    """A node's room for token files."""

    folder: Path | None
    """None to keep none."""
    bytes_max: float | None = None
    """What all of them may take together; None for what the disk has."""

    def require(self, size: int, *, at_least: bool = False) -> None:
        """Refuse to write what would not fit. Raises MisconfiguredError."""
        if self.folder is None or size == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        much = f"{'at least ' if at_least else ''}{size / (1 << 30):.3g} GiB"
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise MisconfiguredError(
                f"spec.trainer.data: {much} of tokens to write, {free / (1 << 30):.3g} GiB free: "
                f"{self.folder}",
                hint="free some space on this node's disk, or train on less",
            )
        if self.bytes_max is None:
            return
        used = sum(path.stat().st_size for path in self.folder.glob("tokens-*"))
        if used + size > self.bytes_max:
            raise MisconfiguredError(
                f"spec.trainer.data: {much} of tokens to write beside {used / (1 << 30):.3g} GiB, "
                f"limit {self.bytes_max / (1 << 30):.3g} GiB: {self.folder}",
                hint="raise data.cacheGibMax, train on less, or remove token files that are old",
            )


class TokenFile:
    """The tokens of one source on this node.

    Args:
        text: the source.
        tokenizer: what cuts it.
        room: where this node keeps token files.
        held: the share of documents that is held back, in [0, 1).
    """

    def __init__(self, text: Text, tokenizer: Tokenizer, room: Room, *, held: float = 0.0) -> None:
        self._text, self._tokenizer, self._room, self._held = text, tokenizer, room, held
        parts = [_MAGIC.hex(), tokenizer.digest, text.fingerprint, held]
        key = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
        self._path = room.folder / f"tokens-{key[:32]}" if room.folder is not None else None

    @property
    def name(self) -> str:
        """Of the file; "" if it is kept nowhere."""
        return self._path.name if self._path is not None else ""

    @property
    def missing_bytes(self) -> int:
        """What is still to be written, at the least; 0 if all is there."""
        if self._path is None or self._path.exists():
            return 0
        return self._text.bytes * _ID_BYTES // _BYTES_PER_TOKEN

    def make(self, check: Callable[[], None]) -> bool:
        """Tokenise, unless that is done, or another process is at it.

        Args:
            check: called a few times per 0.1 s; may raise. What was tokenised by then is lost.

        Returns:
            Whether the tokens are there.

        Raises:
            MisconfiguredError: if the text is missing, empty, not text, or too much for the disk.
        """
        path = self._path
        if path is None or path.exists():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")) as mine:
            if mine and not path.exists():
                self._make(path, check)
            return mine

    def open(self, check: Callable[[], None]) -> Tokens:
        """Map the tokens, which `make` has made, or which are made now and kept nowhere."""
        if self._path is None:
            with tempfile.TemporaryFile() as file:
                self._write(file, check)
                return _map(file, self._tokenizer.bos)
        return open_file(self._path, self._tokenizer.bos)

    def _make(self, path: Path, check: Callable[[], None]) -> None:
        # One name for all attempts: only the holder of the lock writes, over what a killed one
        # left.
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("w+b") as file:
                self._write(file, check)
                os.fsync(file.fileno())
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.rename(path)

    def _write(self, file: IO[bytes], check: Callable[[], None]) -> None:
        digest = xxhash.xxh3_128(self._tokenizer.digest.encode())
        below = int(self._held * (1 << 64))
        if below:
            digest.update(str(below).encode())
        file.seek(_HEAD_BYTES)
        held = 0
        with tempfile.TemporaryFile(dir=self._room.folder) as aside:
            sides = (_Side(file, self._room), _Side(aside, self._room))
            for document in self._text.documents():
                content = self._encode(document, check)
                digest.update(content)
                # Of the text alone: a document stays on its side whatever comes beside it.
                is_held = below and xxhash.xxh3_64_intdigest(document.encode()) < below
                held += bool(is_held)
                sides[bool(is_held)].add(content)
            trained, kept = (side.flush() for side in sides)
            aside.seek(0)
            shutil.copyfileobj(aside, file)
        account = msgspec.json.encode(
            Account(
                files=tuple(self._text.accounts),
                held=held,
                bad_shown=tuple(self._text.bad_shown),
            )
        )
        file.write(account)
        file.seek(0)
        file.write(_HEAD.pack(_MAGIC, trained, digest.digest(), kept, len(account)))
        file.flush()

    def _encode(self, document: str, check: Callable[[], None]) -> bytes:
        pieces = []
        # A piece takes some 50 ms; the tokens are those of the whole, which is cut there anyway.
        for at in range(0, len(document), PIECE_CHARS_MAX):
            check()
            pieces.append(self._tokenizer.encode(document[at : at + PIECE_CHARS_MAX]))
        ids = np.concatenate(([self._tokenizer.bos], *pieces, [self._tokenizer.eos]))
        return ids.astype("<u4").tobytes()


class _Side:
    """One of the two parts of a token file: what is trained on, and what is held back."""

    def __init__(self, file: IO[bytes], room: Room) -> None:
        self._file, self._room = file, room
        self._chunk = bytearray()
        self._written = 0

    def add(self, content: bytes) -> None:
        self._chunk += content
        if len(self._chunk) >= _CHUNK_BYTES:
            self.flush()

    def flush(self) -> int:
        """Write what is left; return the number of ids written in all."""
        self._room.require(len(self._chunk))
        self._file.write(self._chunk)
        self._file.flush()
        self._written += len(self._chunk) // _ID_BYTES
        self._chunk.clear()
        return self._written


def join(parts: Sequence[Tokens], folder: Path | None, address: str) -> Tokens:
    """Return the tokens of a source that is kept in parts, and keep what became of its documents.

    Raises:
        MisconfiguredError: if there are none.
    """
    if len(parts) == 1:
        return parts[0]
    accounts = [part.account for part in parts]
    account = Account(
        files=tuple(file for each in accounts for file in each.files),
        held=sum(each.held for each in accounts),
        bad_shown=tuple(words for each in accounts for words in each.bad_shown)[:BAD_SHOWN],
    )
    if not any(file.documents for file in account.files):
        raise no_text(address)
    digest = xxhash.xxh3_128_hexdigest("".join(part.digest for part in parts).encode())
    if folder is not None:
        path = folder / f"account-{digest}"
        if not path.exists():
            write_whole(path, msgspec.json.encode(account))
    return Tokens(
        Joined([part.ids for part in parts]),
        digest,
        parts[0].bos,
        held=Joined([part.held for part in parts]),
        account=account,
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that nobody sees half of; if several do so at once, the last wins."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.rename(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; say whether."""
    # The kernel drops the lock of a process that is killed, so nobody waits for the dead.
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def account_of(folder: Path, digest: str) -> Account | None:
    """Return what became of the documents of a source that this node has read, by its digest."""
    joined = folder / f"account-{digest}"
    if joined.exists():
        return msgspec.json.decode(joined.read_bytes(), type=Account)
    for path in sorted(folder.glob("tokens-*")):
        if path.suffix:
            continue
        with path.open("rb") as file:
            head = _read_head(file)
            if head is not None and head[2].hex() == digest:
                return _read_account(file, head[4])
    return None


def open_file(path: Path, bos: int) -> Tokens:
    """Map a token file. Raises OSError if it is none of this version, or not whole."""
    with path.open("rb") as file:
        return _map(file, bos)


def _map(file: IO[bytes], bos: int) -> Tokens:
    head = _read_head(file)
    if head is None:
        size = file.seek(0, os.SEEK_END)
        raise OSError(f"not a token file of this version, {size} bytes: {file.name}")
    _, trained, digest, held, account = head
    ids: npt.NDArray[np.uint32] = np.memmap(
        file, "<u4", "r", offset=_HEAD_BYTES, shape=(trained + held,)
    ).view(np.ndarray)
    return Tokens(
        ids[:trained],
        digest.hex(),
        bos,
        held=ids[trained:],
        account=_read_account(file, account),
    )


def _read_head(file: IO[bytes]) -> tuple[bytes, int, bytes, int, int] | None:
    """Return the head of a whole token file of this version, else None."""
    file.seek(0)
    content = file.read(_HEAD.size)
    size = file.seek(0, os.SEEK_END)
    if len(content) != _HEAD.size:
        return None
    magic, trained, digest, held, account = _HEAD.unpack(content)
    if magic != _MAGIC or size != _HEAD_BYTES + _ID_BYTES * (trained + held) + account:
        return None
    return magic, trained, digest, held, account


def _read_account(file: IO[bytes], size: int) -> Account:
    file.seek(-size, os.SEEK_END)
    return msgspec.json.decode(file.read(size), type=Account)
