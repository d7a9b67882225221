"""How often micro-batches are computed once more, and what that vouches for."""

import pytest
import torch

from orchestrator.protocol import runfile
from trainer.replay import Pace, every, halves, joined, known_good, of_itself, split
from trainer.shares import Place, Share, share_of


def test_replays_mean_nothing_once_most_ranks_differ_from_themselves() -> None:
    assert of_itself([(1, 1), (2, 2), (3, 3)]) == ""
    assert of_itself([(1, 1), (2, 9), (3, 3)]) == "", "a device that errs at times is to be named"
    assert of_itself([(1, 9), (2, 9), (3, 3)]).startswith("on 2 of 3 ranks the same")


def test_digests_survive_the_way_through_floating_point() -> None:
    digests = [0, 1, -1, 1 << 62, -(1 << 63), 0x123456789ABCDEF]

    row = halves(torch.tensor(digests)).tolist()

    found = [joined(low, high) for low, high in zip(row[::2], row[1::2], strict=True)]
    assert found == [digest % (1 << 64) for digest in digests]
    assert row == [half for digest in found for half in split(digest)]


def shares(batch: int, replicas: int, shards: int) -> list[Share]:
    job = runfile.Trainer(global_batch=batch, micro_batch=1)
    return [
        share_of(job, Place(replica, replicas, shard, shards))
        for replica in range(replicas)
        for shard in range(shards)
    ]


def test_it_is_done_as_often_as_its_share_of_the_time_allows() -> None:
    one, sixteen = shares(1, 1, 1)[0], shares(16, 1, 1)[0]

    assert (every(0.01, one), every(0.01, sixteen), every(1.0, one)) == (100, 7, 1)
    assert every(0.01, sixteen, stages=4) == 22, "4 stages one after the other, of 16 + 3"


@pytest.mark.parametrize(("replicas", "shards"), [(7, 1), (3, 2)])
def test_ranks_with_uneven_shares_replay_in_the_same_steps(replicas: int, shards: int) -> None:
    """Who replays waits for all others; who does so in another step waits in vain."""
    uneven = shares(32, replicas, shards)

    assert len({len(share.micro_batches) for share in uneven}) == 2
    assert len({every(0.01, share) for share in uneven}) == 1


def test_nobody_vouches_for_steps_between_the_last_replay_and_what_was_restored() -> None:
    assert [known_good(step, 10) for step in (0, 9, 11, 15, 30)] == [0, 0, 0, 4, 19]
    assert known_good(15, 1) == 13


def test_replays_that_cost_more_than_their_share_come_more_rarely_within_bounds() -> None:
    (own,) = shares(16, 1, 1)
    pace = Pace(0.01, own)
    assert (pace.every, pace.longest) == (7, 28)

    for costs in [(0.09, 0.3), (0.12, 0.1), (0.0, 0.2), (0.11, 0.4)]:
        assert pace.every == 7, "what one replay cost says little"
        pace.paid(costs)

    # The least of each: 0.09, 0.10 and 0.11 steps; of who does not know nothing is learned.
    assert pace.every == 10
    for _ in range(3):
        pace.paid((0.9, 0.9))
    assert pace.every == 28
    for _ in range(3):
        pace.paid((0.001, 0.002))
    assert pace.every == 7, "nor more often than its passes alone would allow"
    always = Pace(1.0, own)
    for _ in range(3):
        always.paid((2.0, 2.0))
    assert always.every == 1, "that is what whoever asks for all the time wants"


def test_who_is_watched_is_looked_at_in_every_step_and_vouches_for_no_step_more() -> None:
    (own,) = shares(16, 1, 1)
    usual, watched = Pace(0.01, own), Pace(0.01, own, watched=True)
    for _ in range(3):
        watched.paid((0.9, 0.9))

    assert watched.every == 1
    assert watched.longest == usual.longest, "the generation before may have been another"
