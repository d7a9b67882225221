"""A save of `storage.dcp` that is killed leaves a whole checkpoint or none."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from storage import dcp
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import check_shard
from storage.errors import StorageError
from storage.faulty import FaultyStore
from storage.manifest import Manifest
from storage.memory import MemoryStore
from storage.wrappers import RetryingStore
from tests.crashes import Killed, Killer, copy
from tests.faulted import FAULTS
from tests.states import saved

RANKS = 2


def state(step: int) -> dict[str, object]:
    return {"w": torch.full((5, 3), float(step)), "step": step}


def check(store: BlobStore, *stays: int) -> list[int]:
    """Check that every visible checkpoint is whole and loads; return their steps."""
    steps = []
    for record in Catalog(store).commits():
        steps.append(record.step)
        if record.superseded:
            continue
        assert isinstance(record.manifest, Manifest), record.fault
        for shard in range(record.manifest.shards):
            check_shard(store, record.manifest, shard)
        found = {"w": torch.zeros(5, 3), "step": -1}
        torch_dcp.load(found, storage_reader=dcp.StorageReader(store, step=record.step))
        assert found["step"] == record.step
        assert torch.equal(found["w"], torch.full((5, 3), float(record.step)))
    assert set(stays) <= set(steps)
    return steps


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_killed_before_any_operation_it_leaves_a_whole_checkpoint_or_none() -> None:
    prepared, seen = MemoryStore(), set()
    saved(prepared, state(10), 10, ranks=RANKS)
    for number in itertools.count():
        store, killer = copy(prepared), Killer(number)
        with contextlib.suppress(Killed):
            saved(FaultyStore(store, before=killer.come), state(20), 20, ranks=RANKS)
        seen.add(tuple(check(copy(store), 10)))
        # The restarted job has a newer epoch and saves the step again.
        saved(store, state(20), 20, epoch=2, ranks=RANKS)
        check(store, 10, 20)
        if not killer.killed:
            break
    assert seen == {(10,), (20, 10)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", FAULTS)
def test_a_store_that_fails_at_any_put_leaves_a_whole_checkpoint_or_none(name: str) -> None:
    puts = 2 * RANKS + 1
    for number in range(puts):
        inner, calls = MemoryStore(), itertools.count()
        saved(inner, state(10), 10, ranks=RANKS)
        faulty = FaultyStore(inner, sleep=lambda _: None)

        def spoil(
            operation: str,
            _key: str,
            faulty: FaultyStore = faulty,
            calls: "itertools.count[int]" = calls,
            number: int = number,
        ) -> None:
            if operation == "put" and next(calls) == number:
                FAULTS[name](faulty)

        faulty.before = spoil
        done = True
        try:
            saved(
                RetryingStore(faulty, attempts_max=3, sleep=lambda _: None),
                state(20),
                20,
                ranks=RANKS,
            )
        except StorageError:
            done = False
        newest, rejected = Catalog(FaultyStore(inner)).newest_verified()
        assert newest is not None
        if done:
            assert newest.step == 20
        else:
            assert newest.step == 10 or not rejected
        saved(inner, state(30), 30, epoch=2, ranks=RANKS)
        found = {"w": torch.zeros(5, 3), "step": -1}
        torch_dcp.load(found, storage_reader=dcp.StorageReader(inner))
        assert found["step"] == 30
