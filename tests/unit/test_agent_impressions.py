"""What an agent says of a shard beside its digest, from its index and from its bytes."""

from typing import Any

import numpy as np
import pytest

from orchestrator.agent.impressions import SAMPLE_BYTES, SAMPLE_EVERY, of_index, of_shard
from orchestrator.protocol.messages import Impression
from storage.shard import Chunk, ShardIndex, ShardMeta, encode_index, plan, seal

ITEMS = 3 * SAMPLE_EVERY // 4


def shard(
    values: dict[str, float], *, step: int = 3, dtype: str = "F32", at: int = 0
) -> tuple[ShardIndex, bytearray]:
    """Return a shard with a chunk for each state, of one value, but for item 0 that has `at`."""
    layout = plan(
        Chunk(fqn="w", state=state, dtype=dtype, shape=(ITEMS,), global_shape=(ITEMS,), offset=(0,))
        for state in values
    )
    body = bytearray(layout.size)
    for name, view in layout.views(body).items():
        items = np.full(ITEMS, values[name.partition("/")[0]], np.float32)
        view[:] = items.view(np.uint8).data
    meta = ShardMeta(run_id="r", model="m", step=step, epoch=1, shard=0, shards=1, extra={"n": at})
    return seal(layout, body, meta), body


def seen(values: dict[str, float], **more: Any) -> Impression:
    index, body = shard(values, **more)
    return of_shard(index, body)


def test_the_index_alone_says_the_same_of_digests_boxes_and_counters() -> None:
    index, body = shard({"param": 0.5, "exp_avg": 0.25})

    found = of_shard(index, body)

    told = of_index(encode_index(index).decode())
    assert (told.content, told.boxes, told.extra) == (found.content, found.boxes, found.extra)
    assert (found.rms, found.bad, found.moving) == (0.5, (), told.moving)
    assert len(found.moving) == len(found.content) == 32


def test_equal_bytes_look_equal_whatever_step_they_are_said_to_be_of() -> None:
    one, same = seen({"param": 0.5, "exp_avg": 1.0}), seen({"param": 0.5, "exp_avg": 1.0}, step=9)
    weights = seen({"param": 0.25, "exp_avg": 1.0})

    assert one == same
    assert (weights.content == one.content, weights.moving == one.moving) == (False, True)
    assert seen({"param": 0.5, "exp_avg": 1.0}, at=1).extra != one.extra


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_by_its_chunk(value: float) -> None:
    found = seen({"param": 0.5, "exp_avg": value})

    assert found.bad == ("exp_avg/w",)
    assert found.rms == 0.5


def test_samples_are_taken_all_over_a_chunk() -> None:
    index, body = shard({"param": 0.5})
    start = index.chunks[0].start + 2 * SAMPLE_EVERY
    body[start : start + SAMPLE_BYTES] = np.full(SAMPLE_BYTES // 4, np.nan, "f4").tobytes()

    assert of_shard(index, body).bad == ("param/w",)


def test_moments_of_zero_and_other_kinds_of_numbers_say_nothing() -> None:
    assert seen({"param": 0.5, "exp_avg": 0.0}).moving == ""
    integers = seen({"param": 0.5}, dtype="I32")
    assert (integers.rms, integers.bad, integers.moving) == (-1.0, (), "")
