"""However many replicas there are, each sample of a global batch is trained on once."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol.runfile import Trainer
from trainer.shares import Place, share_of

RANKS = st.integers(1, 6)
SMALL = st.integers(1, 4)


def world(job: Trainer, replicas: int, shards: int) -> list[list[range]]:
    places = itertools.product(range(replicas), range(shards))
    return [share_of(job, Place(r, replicas, s, shards)).micro_batches for r, s in places]


@given(wanted=RANKS, shards=SMALL, size=SMALL, passes=SMALL, data=st.data())
def test_shares_of_any_number_of_replicas_are_the_global_batch(
    wanted: int, shards: int, size: int, passes: int, data: st.DataObject
) -> None:
    there = data.draw(st.integers(1, wanted))
    job = Trainer(
        global_batch=wanted * shards * size * passes,
        micro_batch=size,
        reduction=data.draw(st.sampled_from(["fast", "deterministic"])),
    )

    shares = world(job, there, shards)

    samples = [sample for share in shares for indices in share for sample in indices]
    assert sorted(samples) == list(range(job.global_batch))
    assert {len(indices) for share in shares for indices in share} == {size}
    counts = [len(share) for share in shares]
    for replica in range(there):
        # Ranks of a replica meet in every pass.
        assert len(set(counts[replica * shards :][:shards])) == 1
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1


@given(replicas=RANKS, shards=SMALL, share=st.integers(1, 12))
def test_ranks_of_a_whole_world_take_one_stretch_each_in_the_order_of_ranks(
    replicas: int, shards: int, share: int
) -> None:
    job = Trainer(global_batch=replicas * shards * share)

    shares = world(job, replicas, shards)

    assert shares == [
        [range(rank * share, (rank + 1) * share)] for rank in range(replicas * shards)
    ]


@given(replicas=RANKS, shards=SMALL, size=SMALL, more=st.integers(0, 9))
def test_a_round_of_deterministic_reduction_is_a_stretch_whoever_takes_it(
    replicas: int, shards: int, size: int, more: int
) -> None:
    count = replicas + more
    job = Trainer(
        global_batch=count * shards * size,
        micro_batch=None if size == 1 else size,
        reduction="deterministic",
    )

    for replica, shard in itertools.product(range(replicas), range(shards)):
        share = share_of(job, Place(replica, replicas, shard, shards))

        assert [at for rounds in share.rounds for at in rounds] == list(range(count))
        assert len(share.micro_batches) <= share.most <= 1 + count // replicas
        for at, indices in zip(share.rounds[replica], share.micro_batches, strict=True):
            first = (at * shards + shard) * size
            assert indices == range(first, first + size)
