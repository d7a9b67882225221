"""The node's way to the durable tier, and what a fault plan does to it."""

import asyncio
import time
from pathlib import Path

import pytest

from orchestrator.agent.durable import DurableTier
from storage.address import open_store
from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.commit import commit, write_shard
from storage.errors import BlobNotFoundError, StorageFullError, UnsupportedUriError
from storage.local import LocalStore
from storage.manifest import Manifest, make_manifest
from tests.buckets import Server
from tests.shards import sealed


def checkpoint(store: BlobStore, step: int, generation: int = 1) -> Manifest:
    receipts = [write_shard(store, *sealed(shard, step, generation, shards=2)) for shard in (0, 1)]
    manifest = make_manifest(
        receipts, run_id="run-7", model="llama-test", step=step, epoch=generation
    )
    commit(store, manifest, newest_epoch_known=generation)
    return manifest


def test_what_is_asked_of_the_store_is_counted(tmp_path: Path) -> None:
    tier = DurableTier(tmp_path.as_uri())
    assert tier.reads == 0

    tier.store.put("k", b"x")
    assert tier.reads == 0
    tier.store.get("k")
    assert tier.reads == 1


def test_a_full_disk_refuses_writes_until_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = DurableTier(str(tmp_path))
        tier.fill(None)
        tier.fill(0.05)
        with pytest.raises(StorageFullError):
            # Retried for longer than the fault lasts; but on the loop, where it can not end.
            tier.store.put("k", b"x")
        await asyncio.sleep(0.06)
        tier.store.put("k", b"x")
        assert tier.store.get("k") == b"x"

    asyncio.run(scenario())


def test_a_write_outlasts_a_disk_that_is_full_for_a_moment(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = DurableTier(str(tmp_path))
        tier.fill(0.15)
        await asyncio.to_thread(tier.store.put, "k", b"x")

    asyncio.run(scenario())


def test_a_slow_disk_takes_longer_until_it_is_over_or_the_tier_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = DurableTier(str(tmp_path))
        tier.slow_down(0.1, None)
        begun = time.monotonic()
        tier.store.put("k", b"x")
        assert time.monotonic() - begun >= 0.1

        tier.slow_down(60.0, 0.01)
        await asyncio.sleep(0.05)
        tier.store.get("k")

        tier.slow_down(60.0, None)
        tier.close()
        tier.store.get("k")

    asyncio.run(scenario())


def test_corruption_is_on_the_disk_and_readers_fall_back_to_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    older = checkpoint(store, step=10)
    checkpoint(store, step=20)

    where = DurableTier(str(tmp_path)).corrupt_newest()

    assert "/20-1/s0.st" in where
    found, rejections = Catalog(LocalStore(tmp_path)).newest_verified()
    assert found == older
    assert [(r.step, "xxh3-128 is" in r.reason) for r in rejections] == [(20, True)]


def test_corrupting_twice_damages_the_same_checkpoint_and_does_not_heal_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    checkpoint(store, step=10)
    tier = DurableTier(str(tmp_path))

    tier.corrupt_newest()
    tier.corrupt_newest()

    assert Catalog(store).newest_verified()[0] is None


def test_a_checkpoint_in_a_bucket_is_corrupted_in_the_same_way(s3: Server) -> None:
    uri = s3.uri(s3.bucket())
    store = open_store(uri)
    older = checkpoint(store, step=10)
    checkpoint(store, step=20)

    assert "/20-1/s0.st" in DurableTier(uri).corrupt_newest()

    found, rejections = Catalog(store).newest_verified()
    assert found == older
    assert [(r.step, "xxh3-128 is" in r.reason) for r in rejections] == [(20, True)]


def test_the_newest_generation_of_a_step_is_the_one_that_is_corrupted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    checkpoint(store, step=10, generation=1)
    checkpoint(store, step=10, generation=3)

    assert "/10-3/" in DurableTier(str(tmp_path)).corrupt_newest()


def test_without_a_checkpoint_there_is_nothing_to_corrupt(tmp_path: Path) -> None:
    write_shard(LocalStore(tmp_path), *sealed(0, 5, 1))

    with pytest.raises(BlobNotFoundError, match="no checkpoint"):
        DurableTier(str(tmp_path)).corrupt_newest()


def test_an_address_that_no_store_understands_is_refused_at_once() -> None:
    with pytest.raises(UnsupportedUriError, match="gopher"):
        DurableTier("gopher://x")
