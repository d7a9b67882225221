"""What is read from a body is verified where it arrived, and all that is damaged is named."""

import os
from pathlib import Path

import pytest

from storage.digest import BLOCK_BYTES, PASS_BYTES
from storage.errors import ShardCorruptError
from storage.filling import (
    HEADER,
    file_reader,
    find_damage,
    memory_reader,
    read_chunk,
    require_header,
)
from storage.shard import Chunk, ShardIndex, ShardMeta, StagedChunk, plan, seal

META = ShardMeta(run_id="run", model="m", step=42, epoch=3, shard=1, shards=2)
SIZES = {"a": 100, "b": 3 * PASS_BYTES + 17, "c": 0, "d": PASS_BYTES}


def staged(sizes: dict[str, int] = SIZES) -> tuple[ShardIndex, bytearray]:
    layout = plan(
        Chunk(fqn=name, state="param", dtype="U8", shape=(size,), global_shape=(size,), offset=(0,))
        for name, size in sizes.items()
    )
    body = bytearray(layout.size)
    for view in layout.views(body).values():
        view[:] = os.urandom(len(view))
    return seal(layout, body, META), body


def chunk(index: ShardIndex, fqn: str) -> StagedChunk:
    (found,) = [each for each in index.chunks if each.fqn == fqn]
    return found


@pytest.mark.parametrize("fqn", list(SIZES))
def test_a_chunk_of_any_length_is_read_to_where_it_is_wanted(fqn: str, tmp_path: Path) -> None:
    index, body = staged()
    it = chunk(index, fqn)
    file = tmp_path / "body"
    file.write_bytes(body)

    with file.open("rb") as opened:
        for read in (memory_reader(body), file_reader(opened.fileno())):
            target = bytearray(it.size)
            read_chunk(index, it, read, memoryview(target))
            assert target == body[it.start : it.end]
            require_header(index, read)
            assert find_damage(index, read) == []


def test_a_reader_that_gives_little_at_a_time_is_asked_again() -> None:
    index, body = staged()
    it, read = chunk(index, "a"), memory_reader(body)
    target = bytearray(it.size)

    read_chunk(index, it, lambda at, buffer: read(at, buffer[:7]), memoryview(target))

    assert target == body[it.start : it.end]


def test_every_chunk_that_is_damaged_is_named_with_where_it_lies() -> None:
    index, body = staged()
    for fqn in ("a", "d"):
        body[chunk(index, fqn).end - 1] ^= 1

    found = find_damage(index, memory_reader(body))

    assert [(one.name, one.start, one.end) for one in found] == [
        (f"param/{fqn}", chunk(index, fqn).start, chunk(index, fqn).end) for fqn in ("a", "d")
    ]
    assert f"index says {chunk(index, 'd').xxh3_128}: param/d" in str(found[1])
    with pytest.raises(ShardCorruptError, match="param/d of shard 1 of step 42, epoch 3"):
        read_chunk(index, chunk(index, "d"), memory_reader(body), memoryview(bytearray(PASS_BYTES)))


def test_damage_to_the_header_is_found_and_that_to_a_chunk_in_its_block_is_told_apart() -> None:
    index, body = staged()

    body[chunk(index, "a").start] ^= 1
    assert [one.name for one in find_damage(index, memory_reader(body))] == ["param/a"]
    body[chunk(index, "a").start] ^= 1
    body[20] ^= 1
    (found,) = find_damage(index, memory_reader(body))
    assert (found.name, found.start, found.end) == (HEADER, 0, len(body))
    with pytest.raises(ShardCorruptError, match="crc32c of the header's block"):
        require_header(index, memory_reader(body))


def test_a_body_that_ends_early_is_damaged_in_what_it_lacks() -> None:
    index, body = staged({"a": BLOCK_BYTES, "b": 100, "c": 100})
    short = memory_reader(body[: chunk(index, "b").start + 10])

    found = find_damage(index, short)

    assert [one.name for one in found] == ["param/b", "param/c"]
    assert f"body ends at byte {chunk(index, 'b').start + 10}" in str(found[0])


def test_memory_of_another_size_than_the_chunk_is_refused() -> None:
    index, body = staged()

    with pytest.raises(ValueError, match="99 bytes for a chunk of 100"):
        read_chunk(index, chunk(index, "a"), memory_reader(body), memoryview(bytearray(99)))
