"""The digest of a tensor depends on every bit and place, and on nothing else."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import digest as digests
from trainer.digest import BLOCK, PIECE_WORDS, _bits, _on_device, digest, fuse

SIZE = 3 * BLOCK + 77
CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    return _bits(tensor).to(torch.int32)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def fused() -> Iterator[list[str]]:
    """Compiled for a CPU, as for whatever device there is: the code that this made."""
    known, digests._fused = digests._fused, {}
    with torch._inductor.utils.fresh_cache(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own doings while it compiles
        _, code = run_and_get_code(lambda: fuse(CPU, TYPES))
    yield code
    digests._fused = known


def drawn(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


@pytest.mark.parametrize("borders", [(1,), (BLOCK,), (5, BLOCK + 3, 3 * BLOCK), (100, 101)])
def test_pieces_add_up_to_the_whole_however_it_is_cut(borders: tuple[int, ...]) -> None:
    whole = drawn()

    pieces = torch.tensor_split(whole, borders)
    starts = (0, *borders)
    total = sum(
        (digest(piece, "w", start) for piece, start in zip(pieces, starts, strict=True)),
        torch.tensor(0),
    )

    assert int(total) == int(digest(whole, "w"))


@pytest.mark.parametrize("start", [0, 3, BLOCK - 1, 5 * BLOCK + 9])
def test_the_form_for_a_gpu_gives_the_same(start: int) -> None:
    assert int(_on_device(words_of(drawn()), "w", start)) == int(digest(drawn(), "w", start))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_items_of_any_size_count(dtype: torch.dtype) -> None:
    tensor = (drawn(size=99) * 50).abs().to(dtype)
    other = tensor.clone()
    other[98] += 1

    shares = digest(tensor[:40], "w") + digest(tensor[40:], "w", 40)

    assert int(shares) == int(digest(tensor, "w"))
    assert int(digest(other, "w")) != int(digest(tensor, "w"))


def test_the_name_counts_and_the_shape_does_not() -> None:
    tensor = drawn(size=64)

    assert int(digest(tensor, "a")) != int(digest(tensor, "b"))
    assert int(digest(tensor.view(8, 8), "a")) == int(digest(tensor, "a"))


def test_every_single_bit_counts() -> None:
    tensor = drawn(size=50)
    before = int(digest(tensor, "w"))

    for element in range(50):
        for bit in range(32):
            mask = np.array(1 << bit, np.uint32).view(np.int32).item()
            bits(tensor)[element] ^= mask
            assert int(digest(tensor, "w")) != before
            bits(tensor)[element] ^= mask


@pytest.mark.parametrize("pattern", ["sign bits", "equal bits", "swapped", "tiles", "block moved"])
def test_patterns_that_cancel_out_in_plain_sums_do_not_here(pattern: str) -> None:
    """XOR misses all pairs of equal bits and all that are swapped; sums of products as narrow as a
    word miss all pairs of top bits."""
    chance = np.random.Generator(np.random.Philox(7))
    for trial in range(100):
        tensor = drawn(trial)
        before = int(digest(tensor, "w"))
        i, j = (int(place) for place in chance.choice(SIZE, 2, replace=False))
        words = bits(tensor)
        match pattern:
            case "sign bits":
                words[[i, j]] ^= -(1 << 31)
            case "equal bits":
                words[[i, j]] ^= 1 << int(chance.integers(31))
            case "swapped":
                words[[i, j]] = words[[j, i]]
            case "tiles":
                words[i % 64 :: 64] ^= 1 << int(chance.integers(31))
            case _:
                words[:BLOCK], words[BLOCK : 2 * BLOCK] = (
                    words[BLOCK : 2 * BLOCK].clone(),
                    words[:BLOCK].clone(),
                )
        assert int(digest(tensor, "w")) != before


@pytest.mark.parametrize("value", [0, -1, 1, -(1 << 31)])
@pytest.mark.parametrize("size", [1, 2, BLOCK, SIZE])
def test_no_constant_is_taken_for_a_digest_that_was_not_taken(value: int, size: int) -> None:
    tensor = torch.full((size,), value, dtype=torch.int32)

    assert int(digest(tensor, "exp_avg/w")) != 0
    assert int(digest(tensor, "exp_avg/w")) == int(_on_device(tensor, "exp_avg/w", 0))


class Made(TorchDispatchMode):
    """Notes how large the largest tensor is that is made by a change of type."""

    most = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.most = max(self.most, made.numel())
        return made


def test_a_large_tensor_is_never_widened_as_a_whole() -> None:
    large = torch.ones(3 * PIECE_WORDS + 5, dtype=torch.bfloat16)

    with Made() as made:
        found = digest(large, "w")

    assert made.most == PIECE_WORDS
    assert int(found) == int(_on_device(words_of(large), "w", 0))


@pytest.mark.usefixtures("fused")
@settings(max_examples=40)
@given(data=st.data())
def test_what_takes_one_pass_gives_what_the_host_gives(data: st.DataObject) -> None:
    """Whatever size, place, type and mode; and nothing is compiled anew while a step waits."""
    kind = data.draw(st.sampled_from((*TYPES, torch.float16, torch.float64, torch.complex64)))
    size = data.draw(st.sampled_from((1, 5, 8 * BLOCK, 8 * BLOCK + 1, 300_000)))
    size += data.draw(st.integers(0, 3 * BLOCK))
    start = data.draw(st.sampled_from((0, 1, BLOCK - 1, BLOCK, 77 * BLOCK))) + data.draw(
        st.integers(0, 2 * BLOCK)
    )
    seed = data.draw(st.integers(0, 9))
    drawn = np.random.default_rng(seed).integers(0, 256, 16 * size + 64, dtype=np.uint8)
    skipped = data.draw(st.sampled_from((0, 16)))
    tensor = torch.from_numpy(drawn)[skipped:].view(kind)[:size]
    before = graphs()

    with torch.set_grad_enabled(data.draw(st.booleans())):
        found = int(digest(tensor, "w", start))

    per_item = _bits(tensor).numel() // size
    host = digests._on_host(words_of(tensor).numpy(), "w", start * per_item)
    assert found == digests._signed(host)
    assert graphs() == before


def test_one_pass_keeps_nothing_but_the_sum(fused: list[str]) -> None:
    """No word is written again, let alone in 8 bytes."""
    assert len(fused) == len(TYPES)
    for code in fused:
        sizes = re.findall(r"= empty_strided_cpu\((.*)\)", code)
        assert sizes
        assert set(sizes) == {"(), (), torch.int64"}, "scalars"
        assert len(re.findall(r"^        cpp_fused_\w+\(", code, re.MULTILINE)) == 1, "one kernel"


@pytest.mark.usefixtures("fused")
def test_another_thread_and_a_backward_pass_compile_nothing() -> None:
    """Gradients are digested where they come to be: a thread of their own, on a GPU."""
    large = drawn(size=20 * BLOCK).requires_grad_()
    found, before = [], graphs()
    twice = large * 2
    twice.register_hook(lambda gradient: found.append(int(digest(gradient, "w"))))  # type: ignore[no-untyped-call]

    twice.sum().backward()
    thread = threading.Thread(target=lambda: found.append(int(digest(torch.ones_like(large), "w"))))
    thread.start()
    thread.join()

    assert found[0] == found[1] == int(_on_device(words_of(torch.ones(20 * BLOCK)), "w", 0))
    assert graphs() == before


def test_what_compiles_to_another_sum_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_fused", {})
    monkeypatch.setattr(torch, "compile", lambda of, **_: lambda *inputs: of(*inputs) + 1)

    with pytest.raises(RuntimeError, match="compiled for cpu, the digest of"):
        fuse(CPU, TYPES[:1])

    assert not digests._fused
