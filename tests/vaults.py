"""Vaults on real folders, with gates at which whoever comes by is kept."""

import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    Event,
)
from orchestrator.core.trust import Onset
from orchestrator.protocol.ids import Generation, Seconds, Step
from orchestrator.protocol.messages import Receipt
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import derive
from orchestrator.worlds.vault import LEFT_OVER_S, Vault
from storage.catalog import Catalog
from storage.commit import fetch_shard, write_shard
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.manifest import body_key, decode_manifest
from storage.shard import Chunk, ShardMeta, plan, seal
from tests.runs import steps_job

WITHIN_S = 20.0
LAYOUT = plan([Chunk(fqn="w", state="p", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))])
E = TypeVar("E", bound=Event)


class Gate:
    """A place in a store at which whoever comes by is kept, until it is opened.

    Args:
        operation: of the store; "" for any.
        key: part of the key.
        by: how the names of the threads begin that are kept.
    """

    def __init__(self, operation: str = "", key: str = "", by: str = "holdfast") -> None:
        self.operation, self.key, self.by = operation, key, by
        self.reached, self.opened = threading.Event(), threading.Event()

    def keep(self, operation: str, key: str) -> None:
        name = threading.current_thread().name
        mine = self.operation in {"", operation} and self.key in key and name.startswith(self.by)
        if mine and not self.opened.is_set():
            self.reached.set()
            assert self.opened.wait(WITHIN_S)


class Tier:
    """A vault, the folder that it is about, and what it answers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = LocalStore(root)
        self.told: queue.Queue[Event] = queue.Queue()
        self.judged: list[CheckpointJudged] = []
        self.vaults: list[Vault] = []
        self.gates: list[Gate] = []

    def open(
        self,
        *gates: Gate,
        keep_last: int = 3,
        commit_s: float = WITHIN_S,
        name: str = "steps",
        scrub_mib_per_second: int = 0,
        **changes: Any,
    ) -> Vault:
        """Open a vault whose way to the folder leads through gates; of a run with these changes."""
        run = msgspec.convert(steps_job(**changes), TrainingRun)
        replace = msgspec.structs.replace
        checkpoint = replace(
            run.spec.checkpoint, keep_last=keep_last, scrub_mib_per_second=scrub_mib_per_second
        )
        run = replace(
            run,
            spec=replace(run.spec, checkpoint=checkpoint),
            metadata=replace(run.metadata, name=name),
        )
        self.gates += gates

        def keep(operation: str, key: str) -> None:
            for gate in gates:
                gate.keep(operation, key)

        vault = Vault(
            run,
            str(self.root),
            lambda: Seconds(1.0),
            limits=replace(derive(2.0, 60.0), commit_s=commit_s),
            store=FaultyStore(self.store, before=keep) if gates else None,
        )
        vault.begin(Generation(1))
        self.vaults.append(vault)
        return vault

    def close(self) -> None:
        for gate in self.gates:
            gate.opened.set()
        for vault in self.vaults:
            assert vault.settle(WITHIN_S)

    def write(
        self, step: int, epoch: int, shards: int = 2, name: str = "steps"
    ) -> tuple[Receipt, ...]:
        body = bytearray(LAYOUT.size)
        made = []
        for shard in range(shards):
            meta = ShardMeta(
                run_id=name, model="m", step=step, epoch=epoch, shard=shard, shards=shards
            )
            made.append(write_shard(self.store, seal(LAYOUT, body, meta), body))
        return tuple(Receipt(r.shard, r.size, r.index_digest) for r in made)

    def order(self, vault: Vault, step: int, epoch: int, shards: int = 2) -> None:
        """Order a commit of what is written first."""
        order = CommitCheckpoint(
            generation=Generation(epoch),
            reason="a test",
            step=Step(step),
            receipts=self.write(step, epoch, shards),
            model="m",
        )
        vault.commit(order, self.take)

    def take(self, event: Event) -> None:
        """Take in what a vault tells; verdicts apart, since a scrub gives them at any time."""
        if isinstance(event, CheckpointJudged):
            self.judged.append(event)
        else:
            self.told.put(event)

    def commit(self, vault: Vault, step: int, epoch: int, shards: int = 2) -> None:
        """Commit, and have everything done that comes after it."""
        vault.begin(Generation(epoch))
        self.order(vault, step, epoch, shards)
        self.answer(CheckpointCommitted)
        assert vault.settle(WITHIN_S)

    def answer(self, kind: type[E]) -> E:
        """Return the next answer, which must be of this kind."""
        answer = self.told.get(timeout=WITHIN_S)
        assert isinstance(answer, kind), answer
        return answer

    def search(
        self, vault: Vault, onsets: Sequence[Onset] = (), *, graded: bool = False
    ) -> CheckpointFound:
        vault.search(self.told.put, onsets=onsets, graded=graded)
        return self.answer(CheckpointFound)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that can be resumed from, newest first."""
        catalog = Catalog(self.store)
        return [record.step for record in catalog.commits() if record.manifest is not None]

    def read(self, found: CheckpointFound) -> None:
        """Read what was found, as those who restore from it do: every byte, verified."""
        manifest = decode_manifest(self.store.get(found.key))
        for shard in range(manifest.shards):
            fetch_shard(self.store, manifest, shard)

    def damage(self, step: int, epoch: int) -> None:
        path = self.root / body_key(step, epoch, 0)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    def leave(self, name: str) -> Path:
        """Leave an old unfinished file of a writer on another host behind."""
        path = self.root / "gen" / f".tmp-elsewhere-7-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written_at = path.stat().st_mtime - LEFT_OVER_S - 1
        os.utime(path, (written_at, written_at))
        return path
