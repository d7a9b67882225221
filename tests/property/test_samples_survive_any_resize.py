"""A run whose world is resized at any time trains on the samples of the run that never was."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Ramp
from tests import texts
from trainer.data import Samples, open_data
from trainer.feed import cursor_of
from trainer.prefetch import Prefetch
from trainer.shares import Place, slices
from trainer.tokenizer import open_tokenizer

BATCH, STEPS = 8, 24
SHAPES = [(r, s) for r in range(1, 9) for s in range(1, 9) if BATCH % (r * s) == 0]
"""Replicas and shards per replica."""
RAMP = (
    runfile.BatchChange(tokens=16 * 37, global_batch=16),
    runfile.BatchChange(tokens=16 * 120, global_batch=24),
)
"""From the 6th step on, which begins with the 41st sample; and from the 11th."""
LONGER = (
    runfile.LengthChange(tokens=16 * 50, seq_len=48),
    runfile.LengthChange(tokens=16 * 900, seq_len=32),
)
"""In the middle of an epoch of the first source, and of the second."""


@pytest.fixture(
    scope="module",
    params=[((), ()), (RAMP, ()), (RAMP, LONGER)],
    ids=["steady", "ramp", "longer"],
)
def job(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> runfile.Trainer:
    folder = tmp_path_factory.mktemp("sources")
    return runfile.Trainer(
        batch_ramp=request.param[0],
        length_ramp=request.param[1],
        steps=STEPS,
        seq_len=16,
        global_batch=BATCH,
        seed=5,
        data=texts.mixed(folder, validation=0.1),
    )


@pytest.fixture(scope="module")
def samples(job: runfile.Trainer) -> Samples:
    return Samples(open_data(job.data, open_tokenizer(None, 1280), "", lambda: None), job)


@pytest.fixture(scope="module")
def undisturbed(job: runfile.Trainer, samples: Samples) -> list[bytes]:
    """What a world of one trains on, sample by sample."""
    return trained(job, samples, (1, 1), range(1, STEPS + 1))


def trained(
    job: runfile.Trainer, samples: Samples, shape: tuple[int, int], steps: range
) -> list[bytes]:
    """What all ranks of a world train on in some steps, in the order of the global batch."""
    found: dict[tuple[int, int], bytes] = {}
    replicas, shards = shape
    for replica in range(replicas):
        for shard in range(shards):
            own = list(slices(job, Place(replica, replicas, shard, shards), steps))
            with Prefetch(samples, own, 2, lambda: None, 10.0) as ahead:
                for step, indices in own:
                    batch = ahead.batch(step, indices)
                    for index, row in zip(indices, batch.inputs, strict=True):
                        assert (step, index) not in found
                        found[step, index] = row.tobytes()
    return [found[place] for place in sorted(found)]


LIVES = st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 9), st.integers(0, 4)),
                 min_size=1, max_size=6)  # fmt: skip
"""Of each world: its shape, the steps that it takes, and how many of them are lost with it."""


@settings(max_examples=25)
@given(LIVES)
def test_no_sample_is_skipped_or_repeated_whatever_becomes_of_the_world(
    job: runfile.Trainer, samples: Samples, undisturbed: list[bytes], lives: list[Any]
) -> None:
    kept: list[bytes] = []
    done = 0
    for shape, taken, lost in [*lives, ((1, 1), STEPS, 0)]:
        # All that a new world knows is what the checkpoint says: steps, and the cursor after them.
        assert cursor_of(samples, job).after(done).samples == len(kept)
        steps = range(done + 1, min(done + taken, STEPS) + 1)
        saved = steps[: max(len(steps) - lost, 0)]
        rows = trained(job, samples, shape, steps)
        kept += rows[: sum(Ramp.of(job).batch(step) for step in saved)]
        done += len(saved)

    assert kept == undisturbed
    assert cursor_of(samples, job).after(STEPS).offsets == [
        sum(samples.place(at)[0] == source for at in range(len(kept))) for source in (0, 1)
    ]


def test_a_source_that_is_used_up_begins_again_in_another_order(
    job: runfile.Trainer, samples: Samples, undisturbed: list[bytes]
) -> None:
    if job.length_ramp:
        pytest.skip("windows of each length are asked for their epochs in test_trainer_windows.py")
    epochs = samples.epochs(len(undisturbed))
    by_source = [
        [row for at, row in enumerate(undisturbed) if samples.place(at)[0] == source]
        for source in (0, 1)
    ]

    assert epochs[0] >= 2
    count, more = samples.counts
    first, second = by_source[0][:count], by_source[0][count : 2 * count]
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(by_source[1][:more])) == min(len(by_source[1]), more)


def test_a_held_document_is_in_no_sample(samples: Samples) -> None:
    seen = np.concatenate([source.ids for source in samples.sources])
    held = [source.held for source in samples.sources]

    assert sum(map(len, held)) > 0
    joined = seen.tobytes()
    for ids in held:
        begins = np.flatnonzero(ids == samples.sources[0].bos)
        for document in np.split(ids, begins[1:]) if len(ids) else []:
            assert document.tobytes() not in joined
