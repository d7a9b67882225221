import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.worker import MisconfiguredError
from trainer.text import DEMO_CHARS, Text


def documents(data: tuple[str, ...] | str | None) -> list[str]:
    return list(Text(data).documents())


def test_files_folders_and_globs_are_read_in_a_stable_order(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "inner/c.py", ".git/d.txt", "e.bin"):
        (tmp_path / name).write_text(name)

    assert documents(str(tmp_path)) == ["a.md", "b.txt", "inner/c.py"]
    assert documents(f"{tmp_path}/*.txt") == ["b.txt"]
    assert documents((str(tmp_path / "b.txt"), str(tmp_path / "a.md"))) == ["b.txt", "a.md"]


def test_each_line_of_jsonl_and_each_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["three", None, "four"]}), tmp_path / "b.parquet")

    assert documents(str(tmp_path)) == ["one", "two", "three", "four"]


def test_text_can_lie_behind_any_fsspec_address() -> None:
    with fsspec.open("memory://texts/a.txt", "w") as file:
        file.write("in memory")

    assert documents("memory://texts/a.txt") == ["in memory"]


def test_without_data_the_standard_library_is_read_up_to_a_fixed_length() -> None:
    found = documents(None)

    assert sum(map(len, found)) == DEMO_CHARS
    assert found == documents(None)


def test_a_changed_source_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Text(str(path)).fingerprint

    assert Text(str(path)).fingerprint == before
    path.write_text("longer")
    assert Text(str(path)).fingerprint != before


def test_a_file_whose_name_is_no_text_is_read_and_counts_towards_the_fingerprint(
    tmp_path: Path,
) -> None:
    path, other = (tmp_path / os.fsdecode(name) for name in (b"na\xefve.txt", b"na\xeeve.txt"))
    path.write_text("one")

    before = Text(str(tmp_path)).fingerprint

    assert documents(str(tmp_path)) == ["one"]
    assert Text(str(tmp_path)).fingerprint == before
    path.rename(other)
    assert Text(str(tmp_path)).fingerprint != before


def test_a_refusal_names_a_file_whose_name_is_no_text_in_characters_that_can_be_sent(
    tmp_path: Path,
) -> None:
    (tmp_path / os.fsdecode(b"na\xefve.txt")).write_bytes(b"\xff")

    with pytest.raises(
        MisconfiguredError, match=r"not UTF-8 text at byte 0: .*na\\udcefve"
    ) as caught:
        documents(str(tmp_path))

    assert str(caught.value).isascii()


def test_only_files_of_a_folder_are_read_and_links_to_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "folder.txt").mkdir(parents=True)
    os.mkfifo(folder / "pipe.txt")  # nobody writes to it: whoever opened it would wait for ever
    (tmp_path / "elsewhere").write_text("linked")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere")
    (folder / "pipe-link.txt").symlink_to(folder / "pipe.txt")

    assert documents(str(folder)) == ["linked"]
    assert documents(f"{folder}/*.txt") == ["linked"]
    (folder / "link.txt").unlink()
    (folder / "nowhere.txt").symlink_to(tmp_path / "missing")
    with pytest.raises(MisconfiguredError, match="No such file"):
        documents(str(folder))


@pytest.mark.parametrize("name", ["pipe.txt", "pipe"])
def test_a_pipe_that_is_named_as_the_source_is_refused_and_not_waited_on(
    tmp_path: Path, name: str
) -> None:
    os.mkfifo(tmp_path / name)

    with pytest.raises(MisconfiguredError, match=f"neither file nor folder: .*{name}"):
        documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "nothing there"),
        ("missing-*.txt", None, "nothing there"),
        ("image.png", b"x", "ends in '.png', expected one of .txt"),
        ("empty.txt", b"", "no text"),
        ("blank.jsonl", b"\n\n", "no text"),
        ("latin.txt", "naïve".encode("latin-1"), "not UTF-8 text at byte 2"),
        ("binary.py", b"x\0y", "zero byte at character 1"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("other.jsonl", b'{"body": "a"}\n', "missing required field `text`"),
        ("number.jsonl", b'{"text": 1}\n', "Expected `str`"),
        ("half.jsonl", b'{"text": "a \\ud800 b"}\n', "line 1: half a surrogate pair"),
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', "line 1: begins with a byte order mark"),
        ("bytes.jsonl", b'{"text": "\xff"}\n', "line 1"),
        ("deep.jsonl", b'{"text": "a"}\n' + b'{"a":' * 100_000, "line 2: nested too deeply"),
        ("deep-text.jsonl", b'{"text":' + b"[" * 100_000, "line 1: "),
        ("no.parquet", b"no parquet at all", "not Parquet"),
    ],
)
def test_a_source_that_is_no_text_is_refused_with_its_place_and_a_hint(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(MisconfiguredError) as caught:
        documents(str(tmp_path / name))

    assert says in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.hint


def test_a_parquet_file_without_a_text_column_of_strings_is_refused(tmp_path: Path) -> None:
    for table, says in (
        (pa.table({"body": ["a"]}), "columns are body, expected `text`"),
        (pa.table({"text": [1]}), "holds int, expected strings"),
    ):
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(MisconfiguredError, match=says):
            documents(str(tmp_path / "a.parquet"))


def test_a_parquet_column_that_is_said_to_be_text_and_is_not_is_refused(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    column = pa.Array.from_buffers(pa.string(), 1, buffers)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")

    with pytest.raises(MisconfiguredError, match=r"not UTF-8 text.*a\.parquet"):
        documents(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_no_document_may_be_longer_than_what_fits_into_memory(
    suffix: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.records.DOCUMENT_BYTES_MAX", 64)
    address = f"{scheme}{tmp_path}/a{suffix}"

    def write(text: str) -> None:
        with fsspec.open(address, "wb") as file:
            if suffix == ".parquet":
                parquet.write_table(pa.table({"text": ["b", text]}), file)
            elif suffix == ".jsonl":
                file.writelines(b'{"text":"%s"}\n' % part.encode() for part in ("b", text))
            else:
                file.write(text.encode())

    write("ä" * 26)
    assert documents(address)[-1] == "ä" * 26
    write("ä" * 33)
    with pytest.raises(MisconfiguredError, match="one document of more than"):
        documents(address)


@pytest.mark.parametrize("address", ["github://x", "data:text/plain,abc", "a\0b.txt"])
def test_an_address_that_makes_no_sense_to_its_file_system_is_refused(address: str) -> None:
    with pytest.raises(MisconfiguredError, match=re.escape(f": {address}")) as caught:
        documents(address)
    assert caught.value.hint


@pytest.mark.parametrize("data", ["", ("",), ("memory://a.txt", "")])
def test_an_address_that_is_empty_does_not_mean_the_folder_one_is_in(
    data: tuple[str, ...] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("not meant for training")
    with fsspec.open("memory://a.txt", "w") as file:
        file.write("meant")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(MisconfiguredError, match="names nothing"):
        Text(data)


def test_a_folder_without_text_and_an_unknown_scheme_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfiguredError, match="nothing there"):
        Text(str(tmp_path))
    with pytest.raises(MisconfiguredError, match="Protocol not known: nosuch"):
        Text("nosuch://a.txt")
    with pytest.raises(MisconfiguredError, match="names nothing"):
        Text(())
