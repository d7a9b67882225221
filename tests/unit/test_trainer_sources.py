"""Sources that answer late, wrongly, or not at all; what is skipped is counted."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.worker import Aborted, MisconfiguredError
from tests import texts
from tests.serving import Server
from trainer import retrying
from trainer.retrying import SourceUnavailableError
from trainer.text import Text

DOCUMENTS = texts.documents(200)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    server = Server()
    server.files["/a.jsonl"] = b"".join(b'{"text": "%s"}\n' % text.encode() for text in DOCUMENTS)
    yield server
    server.close()


def read(address: str, **how: object) -> tuple[list[str], Text]:
    text = Text(address, **how)  # type: ignore[arg-type]
    return list(text.documents()), text


def test_documents_are_read_over_http(server: Server) -> None:
    found, text = read(server.address("/a.jsonl"))

    assert found == DOCUMENTS
    assert text.bytes == len(server.files["/a.jsonl"])


def test_a_form_may_be_said_where_the_name_does_not(server: Server) -> None:
    server.files["/export?of=day"] = server.files["/a.jsonl"]

    with pytest.raises(MisconfiguredError, match="ends in"):
        Text(server.address("/export?of=day"))
    found, _ = read(server.address("/export?of=day"), form="jsonl")

    assert found == DOCUMENTS


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_is_busy_for_a_moment_is_asked_again_and_nothing_is_read_twice(
    server: Server, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    server.answers = [status, status, 200, 200, status, status]

    found, _ = read(server.address("/a.jsonl"))

    assert found == DOCUMENTS
    assert "data: attempt 1 of 6" in capfd.readouterr().err


def test_an_answer_that_breaks_off_is_taken_up_again(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    text = Text(server.address("/a.jsonl"))
    server.answers = [200, 0]

    assert list(text.documents()) == DOCUMENTS
    assert server.answers == []
    assert "data: broke off after 0 records, ContentLengthError" in capfd.readouterr().err


def test_a_server_that_stays_away_is_given_up_in_words_that_say_so(server: Server) -> None:
    server.answer_always = 500

    with pytest.raises(
        SourceUnavailableError, match=r"no answer in 6 attempts.*500.*/a\.jsonl"
    ) as caught:
        Text(server.address("/a.jsonl"))
    assert caught.value.hint
    assert server.asked >= 6


def test_whoever_waits_for_a_server_can_be_told_to_leave(server: Server) -> None:
    server.answer_always = 500

    def leave() -> None:
        raise Aborted

    with pytest.raises(Aborted):
        Text(server.address("/a.jsonl"), check=leave)


def test_what_is_not_there_is_refused_at_once(server: Server) -> None:
    with pytest.raises(MisconfiguredError, match="nothing there"):
        Text(server.address("/other.jsonl"))
    assert server.asked <= 4


def test_a_file_that_is_gone_when_it_is_read_stops_the_run_or_is_counted_as_bad(
    server: Server,
) -> None:
    server.files["/b.jsonl"] = server.files["/a.jsonl"]
    addresses = (server.address("/a.jsonl"), server.address("/b.jsonl"))
    stopping, skipping = Text(addresses), Text(addresses, skip=True)
    del server.files["/a.jsonl"]

    with pytest.raises(MisconfiguredError, match=r"/a\.jsonl"):
        list(stopping.documents())
    with pytest.raises(MisconfiguredError, match=r"no text, expected at least one.*/a\.jsonl"):
        list(skipping.documents())
    assert skipping.accounts[0].bad == 1
    assert len(skipping.bad_shown) == 1


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts.jsonl(path, DOCUMENTS)
    documents = Text(str(path)).documents()
    next(documents)
    size = path.stat().st_size
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')

    with pytest.raises(
        MisconfiguredError, match=rf"changed while it was read, expected {size} bytes.*a\.jsonl"
    ) as caught:
        list(documents)
    assert f"found {size + 21} bytes" in str(caught.value)


def spoilt(path: Path, spoil: Callable[[list[bytes]], None]) -> str:
    """Write a document per line, spoilt."""
    texts.jsonl(path, DOCUMENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    spoil(lines)
    path.write_bytes(b"".join(lines))
    return str(path)


def spoil(lines: list[bytes]) -> None:
    lines[3] = b'{"text": \n'
    lines[5] = b'{"body": "a"}\n'
    lines[7] = b'{"text": "\xff"}\n'
    lines[9] = b'{"text": "   "}\n'


def test_bad_records_are_skipped_and_counted_by_policy_and_empty_ones_always(
    tmp_path: Path,
) -> None:
    address = spoilt(tmp_path / "a.jsonl", spoil)

    found, text = read(address, skip=True)

    assert found == [d for at, d in enumerate(DOCUMENTS) if at not in (3, 5, 7, 9)]
    (account,) = text.accounts
    assert (account.documents, account.bad, account.empty) == (196, 3, 1)
    assert [words.partition(":")[0] for words in text.bad_shown] == ["line 4", "line 6", "line 8"]
    assert all(address in words for words in text.bad_shown)
    with pytest.raises(MisconfiguredError, match="line 4: "):
        read(address)


def test_a_line_too_long_to_be_held_is_skipped_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.records.DOCUMENT_BYTES_MAX", 512)
    monkeypatch.setattr("trainer.records._SKIPPED_BYTES", 100)
    address = texts.jsonl(tmp_path / "a.jsonl", ["one", "x" * 2000, "two"])

    found, text = read(address, skip=True)

    assert found == ["one", "two"]
    assert text.accounts[0].bad == 1
    assert "line 2: one document of more than" in text.bad_shown[0]


def test_a_truncated_parquet_file_stops_the_run_or_counts_as_bad(tmp_path: Path) -> None:
    whole = texts.table(tmp_path / "a.parquet", DOCUMENTS)
    cut = tmp_path / "b.parquet"
    cut.write_bytes(Path(whole).read_bytes()[:-100])

    found, text = read(str(tmp_path), skip=True)

    assert found == DOCUMENTS
    assert [account.bad for account in text.accounts] == [0, 1]
    with pytest.raises(MisconfiguredError, match=r"not Parquet.*b\.parquet"):
        read(str(cut))


def test_pages_of_a_parquet_file_that_make_no_sense_are_told_apart_from_a_bad_disk(
    tmp_path: Path,
) -> None:
    path = Path(texts.table(tmp_path / "a.parquet", DOCUMENTS))
    body = bytearray(path.read_bytes())
    body[4:2000] = b"\xff" * 1996
    path.write_bytes(bytes(body))

    with pytest.raises(MisconfiguredError, match=r"not Parquet.*a\.parquet"):
        read(str(path))


def test_a_field_of_another_name_is_read_and_missed_by_that_name(tmp_path: Path) -> None:
    lines = texts.jsonl(tmp_path / "a.jsonl", DOCUMENTS, "body")
    rows = texts.table(tmp_path / "a.parquet", DOCUMENTS, "body")

    assert read(lines, field="body")[0] == read(rows, field="body")[0] == DOCUMENTS
    with pytest.raises(MisconfiguredError, match="missing required field `content`") as caught:
        read(lines, field="content")
    assert '{"content": "..."}' in caught.value.hint
    with pytest.raises(MisconfiguredError, match="columns are body, expected `content`"):
        read(rows, field="content")
