"""The shard's body and index; the safetensors library is the oracle for the body."""

import math
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors

from storage.digest import BLOCK_BYTES, block_crcs, blocks_of
from storage.errors import ShardCorruptError, UnsupportedVersionError
from storage.shard import (
    DATA_ALIGNMENT,
    ITEM_BYTES,
    SHARD_BYTES_MAX,
    Chunk,
    ShardIndex,
    ShardMeta,
    as_staged,
    decode_index,
    encode_index,
    index_digest,
    open_views,
    plan,
    seal,
    verify,
    verify_blocks,
)

META = ShardMeta(run_id="run-7", model="llama-test", step=42, epoch=3, shard=1, shards=2)


def chunk(name: str, dtype: str, *shape: int) -> Chunk:
    state, _, fqn = name.partition("/")
    return Chunk(
        fqn=fqn,
        state=state,
        dtype=dtype,
        shape=shape,
        global_shape=tuple(2 * n for n in shape),
        offset=shape,
    )


CHUNKS = [
    chunk("param/norm", "BF16", 5),
    chunk("param/w", "F32", 3, 7),
    chunk("exp_avg/w", "F32", 3, 7),
    chunk("rng/cuda", "U8", 17),
    chunk("param/empty", "F32", 0, 4),
    chunk("param/scalar", "F32"),
    chunk("cursor/samples", "I64", 1),
]


def staged() -> tuple[ShardIndex, bytearray]:
    layout = plan(CHUNKS)
    buffer = bytearray(layout.size + 100)
    rng = np.random.default_rng(0)
    for view in layout.views(buffer).values():
        view[:] = rng.bytes(len(view))
    return seal(layout, buffer, META), buffer


def test_the_body_opens_in_the_safetensors_library() -> None:
    index, buffer = staged()

    tensors = dict(safetensors.deserialize(bytes(buffer[: index.size])))

    views = open_views(index, buffer)
    assert set(tensors) == set(views) == {c.name for c in CHUNKS}
    for c in CHUNKS:
        assert tensors[c.name]["dtype"] == c.dtype
        assert tuple(tensors[c.name]["shape"]) == c.shape
        assert bytes(tensors[c.name]["data"]) == bytes(views[c.name])


def test_data_starts_at_a_page_and_has_no_gaps_and_natural_alignment() -> None:
    layout = plan(CHUNKS)

    assert len(layout.header) % DATA_ALIGNMENT == 0
    assert layout.spans[0][0] == len(layout.header)
    assert layout.spans[-1][1] == layout.size
    assert all(before[1] == after[0] for before, after in pairwise(layout.spans))
    for c, (start, _) in zip(layout.chunks, layout.spans, strict=True):
        assert start % ITEM_BYTES[c.dtype] == 0


def test_the_order_of_the_chunks_does_not_matter() -> None:
    assert plan(CHUNKS) == plan(reversed(CHUNKS))


def test_the_same_staged_bytes_give_the_same_index_digest() -> None:
    (one, _), (two, _) = staged(), staged()

    assert index_digest(one) == index_digest(two)
    assert decode_index(encode_index(one)) == one


def test_the_state_beside_the_tensors_comes_back_with_its_types() -> None:
    layout = plan(CHUNKS)
    extra = {"lr": 1.0, "step": 2**63, "done": True, "name": "é", "none": None, "l": [1, 1.5, "x"]}
    meta = msgspec.structs.replace(META, extra=extra)

    found = decode_index(encode_index(seal(layout, bytearray(layout.size), meta))).extra

    assert found == extra
    assert all(type(found[key]) is type(extra[key]) for key in extra)


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan], 2**64, b"x", {"a": 1}])
def test_state_that_json_would_change_is_refused(value: object) -> None:
    layout = plan(CHUNKS)
    meta = msgspec.structs.replace(META, extra={"x": value})

    with pytest.raises(ValueError, match="x is"):
        seal(layout, bytearray(layout.size), meta)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([chunk("param/w", "C64", 2)], "dtype is C64"),
        ([chunk("param/", "F32", 2)], "must not be empty"),
        ([chunk("param/w", "F32", 2), chunk("param/w", "F16", 2)], "two chunks"),
        ([chunk("param/w", "F64", SHARD_BYTES_MAX // 8)], "may have"),
        (
            [Chunk(fqn="w", state="p", dtype="F32", shape=(3,), global_shape=(4,), offset=(2,))],
            "not inside",
        ),
        (
            [Chunk(fqn="w", state="p", dtype="F32", shape=(3,), global_shape=(4, 1), offset=(0,))],
            "not inside",
        ),
    ],
)
def test_chunks_that_cannot_be_laid_out_are_refused(bad: list[Chunk], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan(bad)


def test_a_buffer_that_is_too_small_or_read_only_is_refused() -> None:
    layout = plan(CHUNKS)

    with pytest.raises(ValueError, match="writable"):
        layout.views(bytearray(layout.size - 1))
    with pytest.raises(ValueError, match="read-only"):
        seal(layout, memoryview(bytes(layout.size)), META)


def test_a_shard_number_outside_its_count_is_refused() -> None:
    layout = plan(CHUNKS)

    with pytest.raises(ValueError, match="shard 2 of 2"):
        seal(layout, bytearray(layout.size), msgspec.structs.replace(META, shard=2))


def test_a_bad_chunk_is_named() -> None:
    index, buffer = staged()
    start = next(c.start for c in index.chunks if c.name == "exp_avg/w")
    buffer[start] ^= 1

    with pytest.raises(ShardCorruptError, match="exp_avg/w of shard 1 of step 42, epoch 3"):
        verify(index, buffer)


def test_damage_in_the_header_is_found() -> None:
    index, buffer = staged()
    buffer[100] ^= 1

    with pytest.raises(ShardCorruptError, match="header"):
        verify(index, buffer)


def test_a_body_that_is_too_short_is_found_before_its_chunks() -> None:
    index, buffer = staged()

    with pytest.raises(ShardCorruptError, match=f"index says {index.size}"):
        verify(index, buffer[: index.size - 1])
    with pytest.raises(ShardCorruptError, match="has 0 bytes"):
        verify_blocks(index, [])


def test_a_body_of_several_blocks_is_verified_in_pieces() -> None:
    layout = plan([chunk("param/w", "U8", 40 * 1024 * 1024), chunk("param/v", "U8", 100)])
    buffer = bytearray(layout.size)
    index = seal(layout, buffer, META)

    summed = verify(index, buffer)
    assert len(index.crc32c) == 1, "of the block with the header"
    assert list(summed.crc32c) == block_crcs(buffer)
    assert as_staged(summed) == index
    buffer[-200] ^= 0x80
    with pytest.raises(ShardCorruptError, match="param/w"):
        verify(index, buffer)


def test_of_many_chunks_that_threads_verify_the_first_bad_one_is_named() -> None:
    layout = plan([chunk(f"param/{number:02}", "U8", 1 << 20) for number in range(20)])
    buffer = bytearray(layout.size)
    index = seal(layout, buffer, META)

    assert list(open_views(index, buffer)) == [f"param/{number:02}" for number in range(20)]
    for name in ("param/19", "param/07"):
        layout.views(buffer)[name][5] ^= 1
    with pytest.raises(ShardCorruptError, match="param/07"):
        open_views(index, buffer)


def test_nobody_gets_views_of_a_body_whose_header_or_length_is_wrong() -> None:
    index, buffer = staged()

    with pytest.raises(ShardCorruptError, match="body has 4095 bytes"):
        open_views(index, buffer[:4095])
    buffer[20] ^= 1
    with pytest.raises(ShardCorruptError, match="header's block"):
        open_views(index, buffer)


def test_views_for_reading_cannot_be_written() -> None:
    index, buffer = staged()

    assert all(view.readonly for view in open_views(index, buffer).values())


def test_a_shard_without_chunks_is_a_shard() -> None:
    layout = plan([])
    buffer = bytearray(layout.size)

    assert open_views(decode_index(encode_index(seal(layout, buffer, META))), buffer) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10**15},
        {"size": -1},
        {"block_bytes": 1},
        {"crc32c": []},
        {"chunks": []},
        {"surprise": 1},
        {"step": "42"},
    ],
)
def test_an_index_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    index, _ = staged()
    tampered = msgspec.json.decode(encode_index(index)) | change

    with pytest.raises(ShardCorruptError):
        decode_index(msgspec.json.encode(tampered))


def test_an_index_that_is_staged_has_fewer_crcs_and_is_none_that_was_written() -> None:
    layout = plan([chunk("param/w", "U8", 2 * BLOCK_BYTES)])
    body = bytearray(layout.size)
    index = seal(layout, body, META)
    summed = verify(index, body)

    assert decode_index(encode_index(summed)) == summed
    assert decode_index(encode_index(summed), staged=True) == summed
    assert decode_index(encode_index(index), staged=True) == index
    with pytest.raises(ShardCorruptError, match="contradicts itself"):
        decode_index(encode_index(index))
    for crcs in ((), summed.crc32c[:2], (*summed.crc32c, 0)):
        other = encode_index(msgspec.structs.replace(index, crc32c=crcs))
        with pytest.raises(ShardCorruptError, match="contradicts itself"):
            decode_index(other, staged=True)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(ShardCorruptError, match="does not decode"):
        decode_index(data)


def test_an_index_of_a_later_format_version_is_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedVersionError, match="version 2, known is 1") as caught:
        decode_index(b'{"version":2,"novel":true}')
    assert "newer" in caught.value.hint


def test_the_same_index_in_other_bytes_is_refused() -> None:
    """Its digest is taken over the bytes, so there must be one way to write it."""
    index, _ = staged()

    with pytest.raises(ShardCorruptError, match="canonical"):
        decode_index(encode_index(index) + b"\n")


@pytest.mark.parametrize("folder", ["storage", "orchestrator/agent"])
def test_what_threads_decode_is_known_to_msgspec_before_there_are_threads(folder: str) -> None:
    # msgspec 0.22 learns a struct when it is first decoded; a second thread that comes meanwhile
    # ended the process with SIGSEGV, one time in ten. A decoder learns when it is made.
    alone = {"warm.py", "channel.py"}  # decode before there is a thread, or in one only
    late = [
        f"{path.name}: {found}"
        for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py"))
        if path.name not in alone
        for found in re.findall(r"decode\([^)]*type=[A-Z_]\w*", path.read_text())
    ]
    assert late == []


def test_who_restores_is_told_of_the_header_and_of_chunks_and_not_of_crcs_beside_them() -> None:
    layout = plan([chunk("param/w", "F32", (BLOCK_BYTES + 4096) // 4)])
    body = bytearray(layout.size)
    index = verify(seal(layout, body, META), body)
    first, second = index.crc32c
    other = msgspec.structs.replace(index, crc32c=(first, second ^ 1))
    in_header = msgspec.structs.replace(index, crc32c=(first ^ 1, second))

    verify_blocks(other, blocks_of(body), to_restore=True)
    with pytest.raises(ShardCorruptError, match="crc32c"):
        verify_blocks(other, blocks_of(body))
    with pytest.raises(ShardCorruptError, match="crc32c"):
        verify_blocks(in_header, blocks_of(body), to_restore=True)
    body[-1] ^= 1
    with pytest.raises(ShardCorruptError, match="xxh3-128"):
        verify_blocks(index, blocks_of(body), to_restore=True)
