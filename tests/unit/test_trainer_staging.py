"""A state is copied beside the next step, and nothing writes to it before that is done."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.protocol.rank import Misbehave
from orchestrator.worker import RankPhase, Slot
from storage.digest import PASS_BYTES, Lanes
from storage.filling import memory_reader
from storage.shard import Chunk, plan
from trainer import parallel, staging
from trainer.checkpoint import Checkpointer, Cursor, Stamp
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.optim import ShardState
from trainer.staging import Copying
from trainer.step import Training, Unheard
from trainer.train import until_copied

CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=32)
JOB = runfile.Trainer(steps=20, seq_len=8, global_batch=2)
TOKENS = Tokens(np.arange(500, dtype=np.uint32) % 32, "d16e57000000", 31)
CURSOR = Cursor(samples=0, seed=0, seq_len=8, global_batch=2, data="d16e57000000")
STAMP = Stamp("run", CONFIG.fingerprint, 1, CURSOR)
BOUND_S = 20.0


class Rank(Unheard):
    """Takes shards, and notes what it hears."""

    persisting = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slots: list[Slot] = []
        self.handed: dict[int, str] = {}
        self.phases: list[RankPhase] = []
        self.stalls: list[float] = []

    def slot(self, size: int) -> Slot:
        self.slots.append(Slot(len(self.slots), self.folder / f"slot-{len(self.slots)}", size))
        return self.slots[-1]

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        self.handed[step] = index

    def stalled(self, seconds: float) -> None:
        self.stalls.append(seconds)

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        self.phases.append(phase)


class Gate:
    """Lets the first piece of a copy through, and the others once it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._open = threading.Event(), threading.Event()
        copy = staging.copy_piece

        def held_up(target: Any, source: Any) -> None:
            copy(target, source)
            self.begun.set()
            assert self._open.wait(BOUND_S)

        monkeypatch.setattr(staging, "copy_piece", held_up)

    def open(self) -> None:
        self._open.set()


class Trained:
    """A training of one rank, that saves beside its steps as `trainer.train` does."""

    def __init__(self, world: parallel.World, rank: Any) -> None:
        self.rank = rank
        self.training = Training(JOB, CONFIG, Samples(TOKENS, JOB), world)
        self.checkpointer = Checkpointer(self.training.optimizer.shards, world, STAMP)
        self.training.until_copied = until_copied(self.checkpointer, rank)

    def step(self, step: int) -> None:
        self.training.step(step, self.rank)

    def save(self, step: int) -> None:
        assert self.checkpointer.save(self.rank, step, durable=False, overlap=True)

    def staged_lanes(self, step: int) -> Lanes:
        """Return the digest of what was staged, read back into another training."""
        other = Trained(self.training.world, self.rank)
        body = self.rank.slots[-1].buffer
        assert other.checkpointer.restore(self.rank.handed[step], memory_reader(body)) == step
        return other.checkpointer.lanes(step)


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path)


@pytest.fixture
def trained(world: parallel.World, rank: Rank) -> Iterator[Trained]:
    trained = Trained(world, rank)
    yield trained
    trained.checkpointer.settle()


def opened_by_waiting(trained: Trained, gate: Gate) -> list[bool]:
    """Have a gate open when somebody waits for the copy; return whether that was before a write."""
    waited: list[bool] = []
    wait = trained.training.until_copied

    def opening() -> float:
        if trained.checkpointer.copying:
            waited.append(True)
            gate.open()
        return wait()

    trained.training.until_copied = opening
    return waited


def test_an_update_waits_for_the_copy_and_what_is_staged_is_the_state_before_it(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    lanes = trained.checkpointer.lanes(1)
    gate = Gate(monkeypatch)
    waited = opened_by_waiting(trained, gate)

    trained.save(1)
    assert gate.begun.wait(BOUND_S)
    assert not rank.handed, "nothing is handed over that is half copied"
    trained.step(2)
    gate.open()
    trained.checkpointer.settle()

    assert waited == [True]
    assert trained.staged_lanes(1) == lanes != trained.checkpointer.lanes(2)


def test_a_step_computes_beside_the_copy_and_says_when_it_waits(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    gate = Gate(monkeypatch)
    opened_by_waiting(trained, gate)
    trained.save(1)
    rank.phases.clear()
    before = len(rank.stalls)

    trained.step(2)
    trained.checkpointer.settle()

    waits = rank.phases.index(RankPhase.CHECKPOINT)
    assert {RankPhase.FORWARD, RankPhase.BACKWARD} <= set(rank.phases[:waits])
    assert rank.phases[waits:] == [RankPhase.CHECKPOINT, RankPhase.OPTIMIZER]
    assert len(rank.stalls) == before + 1, "what it waited for is a stall"
    assert not trained.checkpointer.copying


def test_a_step_without_a_save_before_it_waits_for_nothing(trained: Trained, rank: Rank) -> None:
    trained.step(1)
    trained.step(2)

    assert RankPhase.CHECKPOINT not in rank.phases
    assert not rank.stalls


def test_a_bit_that_a_fault_plan_flips_is_not_in_the_save_of_the_step_before(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    lanes = trained.checkpointer.lanes(1)
    gate = Gate(monkeypatch)
    waited = opened_by_waiting(trained, gate)
    last = trained.training.optimizer.shards[-1].name
    flip = {"state": "exp_avg_sq", "tensor": last, "element": 0, "bit": 3, "atStep": 2}
    trained.training.injected.take(Misbehave(how="flip-bit", options=flip))

    trained.save(1)
    assert gate.begun.wait(BOUND_S)
    trained.step(2)
    trained.checkpointer.settle()

    assert waited == [True], "the flip waited, and the update had nothing to wait for any more"
    assert trained.staged_lanes(1) == lanes


def test_who_waits_has_the_rest_copied_before_more_of_it_is_digested() -> None:
    tensors = [torch.arange(300_000.0), torch.ones(200_000)]
    chunks = [
        Chunk(fqn=str(number), state="s", dtype="F32", shape=shape, global_shape=shape, offset=(0,))
        for number, shape in enumerate(tuple(tensor.shape) for tensor in tensors)
    ]
    layout = plan(chunks)
    body = bytearray(layout.size)
    copying = Copying(layout, tensors, memoryview(body))

    copying.fill(0, memoryview(body)[:PASS_BYTES])
    assert not any(layout.views(body)["s/1"]), "nobody waits: piece by piece"
    waiting = threading.Thread(target=copying.wait)
    waiting.start()
    assert copying.waited_for.wait(BOUND_S)
    copying.fill(PASS_BYTES, memoryview(body)[PASS_BYTES:][:PASS_BYTES])
    waiting.join(BOUND_S)

    assert not waiting.is_alive()
    for number, tensor in enumerate(tensors):
        assert bytes(layout.views(body)[f"s/{number}"]) == tensor.numpy().tobytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_copy_that_comes_to_nothing_ends_the_rank_and_is_not_handed_over(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)

    def broken(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(staging, "copy_piece", broken)
    trained.save(1)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        trained.step(2)
    trained.checkpointer.settle()
    assert not rank.handed


def test_a_save_that_does_not_overlap_is_copied_when_it_returns(
    trained: Trained, rank: Rank
) -> None:
    trained.step(1)
    lanes = trained.checkpointer.lanes(1)

    assert trained.checkpointer.save(rank, 1, durable=False)
    with torch.no_grad():
        trained.training.optimizer.shards[0].param.zero_()
    trained.checkpointer.settle()

    assert trained.staged_lanes(1) == lanes


def test_parts_without_elements_and_parts_of_several_pieces_are_copied_whole(
    world: parallel.World, rank: Rank
) -> None:
    shards = []
    for name, items in (("a", 0), ("b", 300_000), ("c", 1), ("d", 0)):
        weight = torch.nn.Parameter(torch.arange(float(items)), requires_grad=False)
        shards.append(ShardState(name, weight, weight.detach(), weight + 1, weight + 2))
    checkpointer = Checkpointer(shards, world, STAMP)
    lanes = checkpointer.lanes(4)

    assert checkpointer.save(rank, 4, durable=False, overlap=True)
    checkpointer.await_copied(rank)
    checkpointer.settle()
    for shard in shards:
        for tensor in shard[2:]:
            tensor.detach().zero_()
    checkpointer.restore(rank.handed[4], memory_reader(rank.slots[-1].buffer))

    assert checkpointer.lanes(4) == lanes
