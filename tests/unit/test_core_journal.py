"""Lines of the journal: text that a person can read, and packed where nobody would."""

import base64
import zlib

import msgspec
import pytest
import xxhash

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.events import Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Seconds
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles


def tick(ranks: int) -> journal.Entry:
    """A tick of so many ranks, each of which says something else."""
    event = Telemetry(
        at=Seconds(1000.0),
        generation=Generation(1),
        heard=tuple(NodeId(f"node-{index}") for index in range(ranks // 8)),
        phases=(2,),
        steps=(100,),
        progress=tuple(1000 + rank % 7 for rank in range(ranks)),
        states="S",
        cpu_s=tuple(round(900 + rank * 0.37 % 50, 2) for rank in range(ranks)),
        stall_s=0.0,
    )
    return journal.Entry(seq=1, event=event)


HEAD = journal.line(
    journal.Header(run_id="a", run=compose.parse(runfiles.text(), TrainingRun, "run.yaml"))
)


def test_a_tick_of_thousands_of_ranks_takes_a_fraction_of_its_text_and_is_read_back() -> None:
    entry = tick(16_384)

    line = journal.line(entry)

    assert line.count(b"\n") == 1
    assert len(line) < len(msgspec.json.encode(entry)) / 2.5
    assert journal.read(HEAD + line).entries == [entry]


def test_a_short_line_is_text_that_a_person_can_read() -> None:
    assert b'"cpu_s":[' in journal.line(tick(8))


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_packed_line_that_was_torn_off_is_named(cut: int) -> None:
    line = journal.line(tick(4096))

    read = journal.read(HEAD + line + line[:-cut])

    assert (len(read.entries), read.good_bytes) == (1, len(HEAD + line))
    assert "line 3 is torn" in read.torn


@pytest.mark.parametrize("body", [b"~", b"~AAAA", b"~?", b"~" + base64.b64encode(b"{}")])
def test_what_is_packed_otherwise_is_of_another_version(body: bytes) -> None:
    line = b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)

    with pytest.raises(journal.JournalVersionError, match="a line of another version"):
        journal.read(HEAD + line)


def test_what_unpacks_to_more_than_a_line_can_have_is_refused_without_its_memory() -> None:
    """A thousand bytes of zlib make a million, so that a small file would fill the memory."""
    packing = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    packed = [packing.compress(zeros) for _ in range((journal.LINE_MAX_BYTES >> 20) + 1)]
    body = b"~" + base64.b64encode(b"".join(packed) + packing.flush())
    line = b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)

    with pytest.raises(journal.JournalVersionError, match="unpacks to more than 67108864 bytes"):
        journal.read_line(line)


def test_a_journal_of_the_version_before_is_refused_by_its_version_and_is_not_to_be_cut() -> None:
    header, _ = journal.read_line(HEAD)
    assert isinstance(header, journal.Header)
    old = journal.line(msgspec.structs.replace(header, version=1))

    expected = f"version 1, expected {journal.VERSION}"
    with pytest.raises(journal.JournalVersionError, match=expected) as caught:
        journal.read(old)

    assert "cut" not in caught.value.hint
