"""A state that was saved in one cut is taken up in another, to the bit, or refused."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from orchestrator.protocol.layout import Layout
from orchestrator.worker import MisconfiguredError, UnrestorableError
from storage import recut
from storage.blob import BlobStore
from storage.contents import Contents
from storage.errors import ForeignCheckpointError, ShardCorruptError
from storage.local import LocalStore
from storage.manifest import body_key, commit_key
from storage.memory import MemoryStore
from tests.cuts import CURSOR, STAMP, WEIGHTS, Same, Seated, digest, ranks, stored, whole
from trainer import landing, parallel
from trainer.checkpoint import Checkpointer
from trainer.optim import STATES
from trainer.restoring import restored
from trainer.stamp import Stamp


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
@pytest.mark.parametrize("into", [1, 2, 4])
def test_ranks_of_another_cut_have_the_state_to_the_bit(
    cut: int, into: int, ends: ExitStack
) -> None:
    before, store = ranks(cut, ends), MemoryStore()
    held = stored(before, store)
    after = ranks(into, ends, empty=True)

    assert [rank.checkpointer.recut(store, held) for rank in after] == [5] * into

    assert digest(after) == digest(before)
    for mine, theirs in zip(after, ranks(into, ends), strict=True):
        for one, other in zip(mine.shards, theirs.shards, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[2:], other[2:], strict=True))


@pytest.mark.parametrize(
    ("stamp", "says"),
    [
        (STAMP._replace(run_id="other"), "run is run, expected other"),
        (STAMP._replace(model="wider"), "model is model, expected wider"),
        (STAMP._replace(start=msgspec.structs.replace(CURSOR, seed=7)), "seed is 0, expected 7"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_is_touched(
    stamp: Stamp, says: str, ends: ExitStack
) -> None:
    store = MemoryStore()
    held = stored(ranks(2, ends), store)
    (other,) = ranks(1, ends, stamp=stamp, empty=True)
    before = other.checkpointer.lanes(0)

    with pytest.raises(MisconfiguredError, match=says) as caught:
        other.checkpointer.recut(store, held)

    assert "step 5" in str(caught.value)
    assert caught.value.hint
    assert other.checkpointer.lanes(0) == before


def test_what_is_for_a_device_takes_no_more_of_the_host_at_a_time_than_it_may(
    ends: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, store = ranks(2, ends), MemoryStore()
    held = stored(before, store)
    (after,) = ranks(1, ends, empty=True)
    fills: list[list[int]] = []
    fill = recut.fill

    def counted(store: BlobStore, held: Contents, boxes: list[recut.Box], *more: Any) -> None:
        fills.append([len(box.memory) for box in boxes])
        fill(store, held, boxes, *more)

    monkeypatch.setattr(landing.recut, "fill", counted)
    monkeypatch.setattr(landing, "_room_on_host", lambda tensor: tensor.nbytes)
    monkeypatch.setattr(landing, "AT_ONCE_BYTES", 130)

    assert after.checkpointer.recut(store, held) == 5

    assert digest([after]) == digest(before)
    assert len(fills) > 1
    assert all(sum(sizes) <= 130 or len(sizes) == 1 for sizes in fills)
    assert sum(map(len, fills)) == len(WEIGHTS) * len(STATES)


def test_a_rank_is_told_where_the_checkpoint_is_and_says_that_it_lives_while_it_reads(
    tmp_path: Path, ends: ExitStack
) -> None:
    before = ranks(2, ends)
    stored(before, LocalStore(tmp_path))
    (after,) = ranks(1, ends, empty=True)
    worker, feed = Seated(), Same()

    done = restored(
        worker, whole(str(tmp_path), commit_key(5, 2)), after.checkpointer, feed, after.world
    )

    assert (done, feed.asked, worker.alive) == (5, [5], 3)
    assert digest([after]) == digest(before)


def test_damage_is_told_as_a_fault_of_the_store_so_that_another_checkpoint_is_looked_for(
    tmp_path: Path, ends: ExitStack
) -> None:
    store = LocalStore(tmp_path)
    stored(ranks(2, ends), store)
    path = tmp_path / body_key(5, 2, 1)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    (after,) = ranks(1, ends, empty=True)

    told = whole(str(tmp_path), commit_key(5, 2))
    with pytest.raises(UnrestorableError, match="ShardCorruptError: crc32c") as caught:
        restored(Seated(), told, after.checkpointer, Same(), after.world)
    assert caught.value.hint == ShardCorruptError.hint


@pytest.mark.parametrize("key", ["", "../5", "gen/00/5-2/s0.st", "/etc/passwd"])
def test_what_is_no_key_of_a_commit_is_not_read(key: str, tmp_path: Path, ends: ExitStack) -> None:
    (after,) = ranks(1, ends, empty=True)

    with pytest.raises(ValueError, match="no key of a commit"):
        restored(Seated(), whole(str(tmp_path), key), after.checkpointer, Same(), after.world)


def test_a_checkpoint_of_another_type_of_numbers_is_refused(ends: ExitStack) -> None:
    store = MemoryStore()
    held = stored(ranks(2, ends), store)
    (after,) = ranks(1, ends, empty=True)
    halves = [each._replace(param=each.param.half()) for each in after.shards]
    world = parallel.World(0, Layout(), torch.device("cpu"))
    ends.callback(world.close)

    with pytest.raises(ForeignCheckpointError, match=r"is F32 of shape .* expected F16"):
        Checkpointer(halves, world, STAMP).recut(store, held)
