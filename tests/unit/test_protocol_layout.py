"""Which rank holds what, and which layouts a run can be cut into."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol.cutting import nearest, obstacles, stages
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.runfile import LengthChange, Parallelism, Trainer
from orchestrator.protocol.sizes import PRESETS, ModelConfig, misfits

layouts = st.builds(Layout, *[st.integers(1, 3)] * 5)


@given(layouts)
def test_ranks_are_counted_with_replicas_slowest_and_tensor_parallelism_fastest(
    layout: Layout,
) -> None:
    places = [layout.position(rank) for rank in range(layout.world_size)]

    assert places == list(np.ndindex(*layout))


@given(layouts)
def test_each_replica_holds_every_shard_once_and_replicas_differ_in_nothing_else(
    layout: Layout,
) -> None:
    replicas: dict[int, list[int]] = {}
    holders: dict[int, set[tuple[int, ...]]] = {}
    for rank in range(layout.world_size):
        at, shard, replica = layout.position(rank), layout.shard_of(rank), layout.replica_of(rank)
        assert replica == at.dp_replicate
        assert layout.rank_of(shard, replica) == rank
        replicas.setdefault(replica, []).append(shard)
        holders.setdefault(shard, set()).add(at._replace(dp_replicate=0))

    assert list(replicas) == list(range(layout.dp_replicate))
    assert all(sorted(shards) == list(range(layout.shard_count)) for shards in replicas.values())
    assert all(len(places) == 1 for places in holders.values())
    assert [layout.shard_of(r) for r in layout.ranks_of(0)] == list(range(layout.shard_count))


@given(st.integers(1, 200), st.integers(1, 40))
def test_stages_have_all_layers_in_order_and_the_ends_have_no_more_than_the_others(
    layers: int, count: int
) -> None:
    if layers < count:
        with pytest.raises(ValueError, match="fewer"):
            stages(layers, count)
        return

    cut = stages(layers, count)

    assert [layer for stage in cut for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in cut]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 2
    assert count <= 2 or max(sizes[0], sizes[-1]) <= min(sizes[1:-1])
    if (layers + 2) % count == 0 and 2 < count < layers:
        assert set(sizes[1:-1]) == {sizes[0] + 1} == {sizes[-1] + 1}


TINY = ModelConfig(dim=32, layers=4, heads=4, kv_heads=2, ffn_dim=64, vocab=64)


@pytest.mark.parametrize(
    ("cut", "job", "ranks", "says", "hint"),
    [
        (
            {"tp": 4},
            {},
            8,
            "kvHeads is 2, expected a multiple of tp = 4",
            "dpShard 4 x tp 2",
        ),
        ({"cp": 4}, {}, 8, "kvHeads is 2, expected a multiple of tp x cp = 4", "x cp 2"),
        (
            {"tp": 2},
            {"ffn_dim": 33},
            8,
            "ffnDim is 33",
            "dpReplicate 1 x dpShard 8",
        ),
        ({"tp": 2}, {"vocab": 65}, 8, "vocab is 65", "dpShard 8"),
        (
            {"tp": 2},
            {"seq_len": 31},
            8,
            "seqLen is 31, expected a multiple of tp x cp = 2",
            "dpShard 8",
        ),
        ({"pp": 8}, {}, 8, "layers is 4, expected at least one for each of the 8 stages", "pp 4"),
        (
            {"pp": 4},
            {"pipeline_schedule": "interleaved", "micro_batch": 1},
            8,
            "the 8 stages of pp 4 x stagesPerRank 2",
            "pp 2",
        ),
        ({}, {"seq_len": 131_073}, 1, "seqLen is 131073, expected at most the", "shorter"),
        (
            {},
            {"length_ramp": (LengthChange(tokens=8 * 32, seq_len=262_144),)},
            1,
            "spec.trainer.lengthRamp: seqLen is 262144, expected at most the model's maxLength",
            "may be raised",
        ),
        ({"pp": 2}, {}, 2, "microBatch is 8, which makes 1", "to 4 or less"),
        ({"pp": 2}, {"global_batch": 4}, 8, "expected at least pp = 2", "dpReplicate 1"),
        (
            {"pp": 2},
            {"pipeline_schedule": "interleaved", "micro_batch": 1, "global_batch": 5},
            2,
            "expected a multiple of the 2 rounds",
            "multiple of pp = 2",
        ),
        (
            {"pp": 2},
            {"reduction": "deterministic", "pipeline_schedule": "interleaved"},
            2,
            "pipelineSchedule is interleaved and spec.trainer.reduction is deterministic",
            "number of replicas",
        ),
        (
            {"pp": 2, "dp_replicate": 5},
            {"reduction": "deterministic", "global_batch": 8},
            10,
            "microBatch is 1, which makes 1 of a share of 1 samples; expected at least pp = 2",
            "the number of ranks",
        ),
    ],
)
def test_a_layout_that_can_not_be_cut_is_refused_with_the_reason_and_what_would_do(
    cut: dict[str, int], job: dict[str, Any], ranks: int, says: str, hint: str
) -> None:
    sizes = {name: job[name] for name in job.keys() & {"ffn_dim", "vocab"}}
    model = msgspec.structs.replace(TINY, **sizes)
    trainer = Trainer(**{"seq_len": 32, **{n: job[n] for n in job.keys() - sizes}})

    found = [*obstacles(model, trainer, Parallelism(**cut).layout(ranks))]

    assert found
    assert says in found[0].message
    assert hint in found[0].hint


@pytest.mark.parametrize("ranks", [8_192, 16_384])
def test_the_announced_layouts_can_be_cut(ranks: int) -> None:
    trainer = Trainer(seq_len=8192, global_batch=2048, micro_batch=1)

    assert not [*obstacles(PRESETS["405B"], trainer, Parallelism(tp=8, pp=16).layout(ranks))]


def test_what_is_named_as_the_nearest_can_be_cut_and_a_layout_that_can_is_its_own_nearest() -> None:
    job = Trainer(seq_len=32, global_batch=8)

    assert nearest(TINY, job, Layout(pp=2, dp_shard=2, tp=2)) == Layout(pp=2, dp_shard=2, tp=2)
    assert nearest(TINY, job, Layout(tp=8)) == Layout(dp_shard=4, tp=2)
    assert nearest(TINY, Trainer(seq_len=32, global_batch=1), Layout(tp=16)) is None


@pytest.mark.parametrize("world", [720_720, 1 << 33, 1 << 80])
def test_the_nearest_layout_of_any_world_is_found_without_trying_all_of_them(world: int) -> None:
    job = Trainer(seq_len=32, global_batch=1 << 40)

    found = nearest(TINY, job, Layout(dp_shard=world // 16, tp=16))

    assert found is None or found.world_size == world
    assert (found is not None) == (world == 1 << 33)


@pytest.mark.parametrize(
    "wrong", [{"layers": 10**12}, {"rope_theta": 0.0}, {"rope_theta": -1.0}, {"norm_eps": -1e-5}]
)
def test_a_model_that_can_not_be_computed_or_counted_is_refused(wrong: dict[str, float]) -> None:
    assert len(list(misfits(msgspec.structs.replace(TINY, **wrong)))) == 1
