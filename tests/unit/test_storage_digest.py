"""The digests: known values, and what must change them."""

import numpy as np
import pytest

from storage.digest import (
    block_crcs,
    chunk_digest,
    combine,
    crc32c,
    digest_stream,
    partial_digest,
    render,
)


def test_published_check_values_are_reproduced() -> None:
    """RFC 3720 B.4 for CRC-32C; the xxHash specification's empty input for xxh3-128."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert chunk_digest(b"") == "99aa06d3014798d86001c324468d497f"


def test_every_block_has_the_crc_of_its_bytes() -> None:
    data = bytes(range(256)) * 10

    assert block_crcs(data, 1000) == [crc32c(data[at : at + 1000]) for at in (0, 1000, 2000)]
    assert block_crcs(b"") == []


@pytest.mark.parametrize("block", [1, 3, 7, 64, 1000])
def test_a_body_in_blocks_of_any_size_has_the_same_span_digests(block: int) -> None:
    body = bytes(range(200))
    spans = [(0, 0), (3, 50), (50, 50), (50, 51), (60, 200), (200, 200)]

    found = digest_stream(spans, [body[at : at + block] for at in range(0, len(body), block)])

    assert found.spans == [chunk_digest(body[start:end]) for start, end in spans]
    assert found.size == len(body)
    assert len(found.crcs) == -(-len(body) // block)


def test_a_body_that_ends_early_yields_fewer_digests() -> None:
    assert len(digest_stream([(0, 4), (4, 8)], [b"12345"]).spans) == 1


def test_the_state_digest_is_the_documented_sum() -> None:
    """Computed here with plain integers, as another implementation (on a GPU) would."""
    import xxhash  # noqa: PLC0415 - the oracle of this test only

    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    values = np.array([1.0, -2.5, 0.0], np.float32)
    expected = []
    for lane in (0, 1):
        key = xxhash.xxh3_64_intdigest(b"param/w", seed=lane)
        bits = values.view(np.uint32).tolist()
        terms = [
            mix(mix((key + i * 0x9E3779B97F4A7C15) & mask) ^ b) for i, b in enumerate(bits, 10)
        ]
        expected.append(sum(terms) & mask)

    assert partial_digest("param/w", values, start=10) == tuple(expected)


def test_values_that_compare_equal_but_differ_in_bits_differ() -> None:
    plus, minus = np.array([0.0]), np.array([-0.0])

    assert partial_digest("w", plus) != partial_digest("w", minus)


def test_a_scalar_and_an_empty_piece_have_a_share() -> None:
    step = partial_digest("step", np.array(7, np.int64))

    assert step != partial_digest("step", np.array(8, np.int64))
    assert partial_digest("w", np.empty((0, 3), np.float32), start=5) == (0, 0)
    assert combine([]) == (0, 0)
    assert render((1, 2**64 - 1)) == "0000000000000001ffffffffffffffff"


@pytest.mark.parametrize(
    ("array", "start", "match"),
    [
        (np.zeros(2, np.complex128), 0, "dtype is complex128"),
        (np.zeros(2, ">f4"), 0, "dtype is >f4"),
        (np.array([None]), 0, "dtype is object"),
        (np.zeros(2), -1, "start is -1"),
    ],
)
def test_what_has_no_defined_digest_is_refused(array: np.ndarray, start: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        partial_digest("w", array, start=start)


def test_a_block_wider_than_the_tensor_that_it_is_of_is_refused() -> None:
    with pytest.raises(ValueError, match="rows have 3 elements, those of the whole tensor 2"):
        partial_digest("w", np.zeros((2, 3), np.float32), row=2)
