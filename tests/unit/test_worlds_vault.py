"""What the durable tier tells a controller, and what it tidies up by itself."""

import os
import queue
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import CheckpointCommitted, CheckpointFound, Event
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.protocol.messages import Receipt
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.vault import LEFT_OVER_S, Vault
from storage.commit import write_shard
from storage.local import LocalStore
from storage.manifest import body_key
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.runs import steps_job

WITHIN_S = 20.0
LAYOUT = plan([Chunk(fqn="w", state="p", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))])


class Tier:
    """A vault, the folder that it is about, and what it answers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = LocalStore(root)
        self.told: queue.Queue[Event] = queue.Queue()
        self.vaults: list[Vault] = []

    def open(self) -> Vault:
        run = msgspec.convert(steps_job(), TrainingRun)
        self.vaults.append(Vault(run, str(self.root), lambda: Seconds(1.0)))
        return self.vaults[-1]

    def write(self, step: int, epoch: int, shards: int = 2) -> tuple[Receipt, ...]:
        body = bytearray(LAYOUT.size)
        made = []
        for shard in range(shards):
            meta = ShardMeta(
                run_id="steps", model="m", step=step, epoch=epoch, shard=shard, shards=shards
            )
            made.append(write_shard(self.store, seal(LAYOUT, body, meta), body))
        return tuple(Receipt(r.shard, r.size, r.index_digest) for r in made)

    def commit(self, vault: Vault, step: int, epoch: int, shards: int = 2) -> None:
        order = CommitCheckpoint(
            generation=Generation(epoch),
            reason="a test",
            step=Step(step),
            receipts=self.write(step, epoch, shards),
            model="m",
        )
        vault.commit(order, Generation(epoch), self.told.put)
        answer = self.told.get(timeout=WITHIN_S)
        assert isinstance(answer, CheckpointCommitted), answer

    def search(self, vault: Vault) -> CheckpointFound:
        vault.search(self.told.put)
        answer = self.told.get(timeout=WITHIN_S)
        assert isinstance(answer, CheckpointFound), answer
        return answer

    def leave(self, name: str) -> Path:
        """Leave an old unfinished file of a writer on another host behind."""
        path = self.root / "gen" / f".tmp-elsewhere-7-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written_at = path.stat().st_mtime - LEFT_OVER_S - 1
        os.utime(path, (written_at, written_at))
        return path


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier(tmp_path / "tier")
    yield tier
    for vault in tier.vaults:
        vault.close()


def test_a_search_tells_the_newest_epoch_also_if_its_checkpoint_is_rejected(tier: Tier) -> None:
    vault = tier.open()
    tier.commit(vault, 60, epoch=1)
    tier.commit(vault, 80, epoch=2)
    path = tier.root / body_key(80, 2, 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    found = tier.search(vault)

    assert (found.step, found.epoch, found.epoch_seen) == (60, 1, 2)
    assert found.shards == 2
    tier.write(100, epoch=7)
    assert tier.search(vault).epoch_seen == 7


def test_a_search_tells_how_many_shards_a_checkpoint_has(tier: Tier) -> None:
    vault = tier.open()
    assert tier.search(vault).shards == 0
    tier.commit(vault, 20, epoch=1, shards=3)
    assert tier.search(vault).shards == 3


def test_what_dead_writers_left_behind_goes_when_a_vault_is_opened_and_after_each_commit(
    tier: Tier,
) -> None:
    before, fresh = tier.leave("0"), tier.leave("1")
    fresh.touch()
    vault = tier.open()
    tier.commit(vault, 20, epoch=1)
    assert not before.exists()

    later = tier.leave("2")
    tier.commit(vault, 40, epoch=1)
    vault.close()

    assert not later.exists()
    assert fresh.exists()
