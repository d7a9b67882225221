"""The journal: every event and what was decided about it, one checksummed line each.

Text only, no I/O: whoever holds the file appends what `line` returns and reads back with
`read`. A line is `<xxh3-64 of the rest> <JSON>`; the JSON carries its sequence number. Of a long
line, such as a tick of thousands of ranks, the JSON is packed: `~<base64 of its zlib>`. The first
line is the header. A line that a crash tore off at the end is tolerated and named; a bad line
anywhere else is corruption and refused, since what follows it can not be trusted to follow.

Feeding the events to a fresh controller gives the same decisions byte for byte (`replay`).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import xxhash

from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision
from orchestrator.core.events import Event
from orchestrator.protocol.runfile import TrainingRun

VERSION = 8
"""Raised whenever the same events lead to other decisions than before: a replay would not notice at
its beginning that it is of another program. 2: replicas count slowest in the order of ranks, and
minReplicas has another default. 3: who is slow is told by as many windows as cover ten steps, and
by processor time as well. 4: a phase of a recovery that was broken off is not given ever longer.
5: a node whose own network is slow may be swapped for it. 6: of replicas one reads a shard from the
durable tier, and the others get it from there. 7: who waits for samples is found within ten
seconds, however long steps take. 8: the embedded trainer goes on from a checkpoint that was cut
otherwise."""
LINE_MAX_BYTES = 64 << 20
"""Also of what is packed. A tick of 100,000 ranks takes a few MiB; a longer line is no journal of
ours."""
PACKED_FROM_BYTES = 4096
"""A JSON of so many bytes or more is packed: nobody reads that many numbers, and a controller of
2,048 nodes would write half a gigabyte of them an hour."""
_PACKED = b"~"
_LEVEL = 1
"""Of zlib: the next takes ten times as long, and saves a quarter."""


class JournalError(Exception):
    """The journal can not be trusted from some line on.

    Attributes:
        hint: what can be done.
    """

    hint = "Copy the file, cut it before the named line, and resume: what came after is lost."


class JournalVersionError(JournalError):
    """The journal is whole, and of another version of this program."""

    hint = (
        "Read it, or go on with its run, with the version of holdfast that wrote it; this one "
        "begins in another folder."
    )


class Header(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First line: whose journal this is."""

    version: int = VERSION
    run_id: str
    run: TrainingRun


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One event and the decisions it led to."""

    seq: int
    event: Event
    decisions: tuple[Decision, ...] = ()


class Journal(NamedTuple):
    """What could be read."""

    header: Header
    entries: list[Entry]
    good_bytes: int
    """Length of the sound part; a writer that goes on cuts the file here first."""
    torn: str
    """What was wrong with the end; "" if nothing was."""


class Rest(NamedTuple):
    """What could be read of a journal behind some line of it."""

    entries: list[Entry]
    good_bytes: int
    """Where its sound part ends."""
    torn: str
    """What was wrong with the end; "" if nothing was."""


class Mismatch(NamedTuple):
    """An event whose decisions came out differently when it was replayed."""

    seq: int
    recorded: bytes
    replayed: bytes


_encode = msgspec.json.Encoder(order="deterministic").encode
_decoder: msgspec.json.Decoder[Header | Entry] = msgspec.json.Decoder(Header | Entry)


def line(record: Header | Entry) -> bytes:
    """Return a record as one line, newline included."""
    body = _encode(record)
    if len(body) >= PACKED_FROM_BYTES:
        body = _PACKED + base64.b64encode(zlib.compress(body, _LEVEL))
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)


def read(data: bytes) -> Journal:
    """Read a journal.

    Raises:
        JournalError: if it has no header, is of another version (JournalVersionError), or a line
            other than the last is damaged or missing.
    """
    first = next(_lines(data, 0), b"")
    header, problem = read_line(first)
    if header is None and len(first) < len(data):
        raise JournalError(f"line 1 is damaged: {problem}, and others follow it")
    if not isinstance(header, Header):
        raise JournalError("no header in the first line; this is not a journal")
    if header.version != VERSION:
        raise JournalVersionError(f"line 1: version {header.version}, expected {VERSION}")
    return Journal(header, *read_rest(data, len(first), 0))


def read_rest(data: bytes, start: int, seq: int) -> Rest:
    """Read what is behind an entry, or behind the header.

    Args:
        data: of the journal.
        start: where that ends.
        seq: of that entry, 0 for the header.

    Raises:
        JournalError: if a line other than the last is damaged or missing.
    """
    entries: list[Entry] = []
    good = start
    for number, raw in enumerate(_lines(data, start), start=seq + 2):
        record, problem = read_line(raw)
        if record is None:
            if good + len(raw) < len(data):
                raise JournalError(f"line {number} is damaged: {problem}, and others follow it")
            return Rest(entries, good, f"line {number} is torn: {problem}")
        if isinstance(record, Header):
            raise JournalVersionError(
                f"line {number}: version {record.version}, expected {VERSION}, in line 1 only"
            )
        if record.seq != number - 1:
            raise JournalError(f"line {number}: event {record.seq}, expected {number - 1}")
        entries.append(record)
        good += len(raw)
    return Rest(entries, good, "")


def replay(controller: Controller, entries: list[Entry]) -> list[Mismatch]:
    """Feed the events to a controller, in order; return where it decides differently.

    Afterwards the controller stands where the one stood that wrote the journal.
    """
    mismatches = []
    for entry in entries:
        recorded = _encode(entry.decisions)
        replayed = _encode(tuple(controller.handle(entry.event)))
        if recorded != replayed:
            mismatches.append(Mismatch(entry.seq, recorded, replayed))
    return mismatches


def _lines(data: bytes, start: int) -> Iterator[bytes]:
    # Not bytes.splitlines: that also cuts at a carriage return, which torn bytes may contain.
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


def _shown(checksum: bytes) -> str:
    """Return what stands in the place of a checksum, for a message."""
    text = checksum[:16].decode("ascii", "replace")
    return text if text.isalnum() else repr(text)


def _unpacked(packed: bytes) -> bytes:
    """Return what is packed; takes no memory for more than a line can have.

    Raises:
        zlib.error: if it is damaged, cut short or longer.
    """
    unpacking = zlib.decompressobj()
    body = unpacking.decompress(packed, LINE_MAX_BYTES + 1)
    if len(body) > LINE_MAX_BYTES:
        raise zlib.error(f"it unpacks to more than {LINE_MAX_BYTES} bytes")
    if not unpacking.eof:
        raise zlib.error("what is packed has no end")
    return body


def read_line(raw: bytes) -> tuple[Header | Entry | None, str]:
    """Return the record of one line, newline included; or None and what is wrong with it.

    Raises:
        JournalVersionError: if nothing is wrong with it, and it says what we do not know.
    """
    if not raw.endswith(b"\n"):
        return None, "it has no end"
    checksum, _, body = raw[:-1].partition(b" ")
    actual = xxhash.xxh3_64_hexdigest(body).encode()
    if checksum != actual:
        return None, f"checksum is {actual.decode()}, the line says {_shown(checksum)}"
    try:
        if body.startswith(_PACKED):
            body = _unpacked(base64.b64decode(body[len(_PACKED) :], validate=True))
        return _decoder.decode(body), ""
    except (msgspec.DecodeError, binascii.Error, zlib.error) as error:
        raise JournalVersionError(f"a line of another version: {error}") from error
