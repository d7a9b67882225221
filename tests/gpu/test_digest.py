"""A GPU digests what it holds as a host does, and about as fast as it reads."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.bench.digest import measure
from trainer import digest as digests
from trainer.digest import BLOCK, ROWS, digest, fuse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU here"),
    pytest.mark.filterwarnings("default"),  # torch warns of its own doings while it compiles
    pytest.mark.timeout(600),
]
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)
SHARE, SHARE_AT_LEAST = 0.6, 0.3
"""Of a copy's bandwidth: the goal, and what a card that others use as well has to reach."""


@pytest.fixture(scope="module", params=["one pass", "operation by operation"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(digests, "_fused", {})
        if request.param == "one pass":
            fuse(torch.device("cuda", 0), TYPES)
        yield str(request.param)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3 * BLOCK + 77, 8 * BLOCK + 1, 5_000_003])
@pytest.mark.parametrize("start", [0, BLOCK - 1, 5 * BLOCK + 9])
def test_a_gpu_comes_to_the_digest_of_the_host(
    way: str, kind: torch.dtype, size: int, start: int
) -> None:
    drawn = np.random.default_rng(size).integers(0, 256, 8 * (size + 1), dtype=np.uint8)
    whole = torch.from_numpy(drawn).view(kind)

    for tensor in (whole, whole[1:]):  # of which one begins where nothing is aligned
        there = whole.to("cuda")[-tensor.numel() :]
        assert int(digest(there, "w", start)) == int(digest(tensor, "w", start)), way


def test_nothing_is_compiled_for_another_size_or_place() -> None:
    fuse(torch.device("cuda", 0), TYPES[:1])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    for size, start in ((ROWS * BLOCK + 1, 0), (1 << 24, 3), (1 << 26, 77 * BLOCK), (1_000_003, 1)):
        digest(torch.ones(size, device="cuda"), "w", start)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_one_pass_has_a_good_part_of_the_bandwidth_of_a_copy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = measure(torch.device("cuda", 0), 1 << 28, 10)

    with capsys.disabled():
        sys.stdout.write(f"\n{torch.cuda.get_device_name(0)}: {found}\n")
    for kind in ("float32", "bfloat16"):
        share = found[kind]["share_of_copy"]["fused"]
        assert share > SHARE_AT_LEAST, f"{share:.2f} of a copy's bandwidth, goal {SHARE}"
