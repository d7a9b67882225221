"""A state is copied beside the next step, and nothing writes to it before that is done."""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.protocol.rank import Misbehave
from orchestrator.worker import Aborted, RankPhase, SaveStuckError, Slot
from storage.digest import PASS_BYTES, Lanes
from storage.filling import memory_reader
from storage.shard import Chunk, plan
from trainer import parallel, staging
from trainer.checkpoint import Checkpointer
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.optim import ShardState
from trainer.reporter import Unheard
from trainer.staging import Copying
from trainer.stamp import Cursor, Stamp
from trainer.step import Training
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
        self.given_back: list[int] = []
        self.given_up: dict[int, str] = {}

    def slot(self, size: int) -> Slot:
        self.slots.append(Slot(len(self.slots), self.folder / f"slot-{len(self.slots)}", size))
        return self.slots[-1]

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        self.handed[step] = index

    def give_back(self, slot: Slot) -> None:
        self.given_back.append(slot.number)

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        assert generation == STAMP.generation
        self.given_up[step] = reason

    def stalled(self, seconds: float) -> None:
        self.stalls.append(seconds)

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        self.phases.append(phase)

    def check(self) -> None:
        """It is never told to leave."""


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
    waiting = threading.Thread(target=copying.wait, args=(math.inf,))
    waiting.start()
    assert copying.waited_for.wait(BOUND_S)
    copying.fill(PASS_BYTES, memoryview(body)[PASS_BYTES:][:PASS_BYTES])
    waiting.join(BOUND_S)

    assert not waiting.is_alive()
    for number, tensor in enumerate(tensors):
        assert bytes(layout.views(body)[f"s/{number}"]) == tensor.numpy().tobytes()


def held_back(trained: Trained, within_s: float) -> Checkpointer:
    """Have saves be given up that are not copied so long after they were begun."""
    checkpointer = trained.checkpointer
    checkpointer._within_s = within_s
    return checkpointer


def test_a_copy_that_is_late_is_given_up_counted_and_handed_over_to_nobody(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    gate = Gate(monkeypatch)
    checkpointer = held_back(trained, 0.05)

    trained.save(1)
    assert gate.begun.wait(BOUND_S)
    trained.step(2)  # it waits for no longer than that, though nobody opens the gate
    assert list(rank.given_up) == [1]
    assert "bytes were copied after" in rank.given_up[1]
    assert not checkpointer.save(rank, 2, durable=False, overlap=True), "the thread is stuck"
    assert not rank.given_back, "it may still write there"

    gate.open()
    checkpointer._within_s = BOUND_S
    checkpointer.settle()

    assert rank.given_back == [0]
    assert rank.handed == {}
    checkpointer.save(rank, 2, durable=False, overlap=True)
    trained.step(3)
    checkpointer.settle()
    assert list(rank.handed) == [2], "what comes next is saved as if nothing had been"
    assert list(rank.given_up) == [1]


def test_a_copy_of_which_nothing_moves_is_given_up_long_before_its_time_is_over(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STILL_S", 0.05)
    trained.step(1)
    gate = Gate(monkeypatch)

    trained.save(1)
    assert gate.begun.wait(BOUND_S)
    trained.step(2)
    gate.open()
    trained.checkpointer.settle()

    assert list(rank.given_up) == [1]
    assert rank.handed == {}


def test_a_copy_that_gets_on_is_waited_for_and_shows_that_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "STILL_S", 0.5)
    size = 12 * PASS_BYTES
    chunk = Chunk(fqn="w", state="s", dtype="U8", shape=(size,), global_shape=(size,), offset=(0,))
    layout = plan([chunk])
    body = bytearray(layout.size)
    copying = Copying(layout, [torch.ones(size, dtype=torch.uint8)], memoryview(body))
    seen: list[int] = []
    turns = iter(range(0, layout.size, PASS_BYTES))

    def one_more(pieces: int) -> None:
        seen.append(pieces)
        start = next(turns)
        copying.waited_for.clear()  # in the pieces of one whom nobody hurries
        copying.fill(start, memoryview(body)[start : start + PASS_BYTES])

    assert copying.wait(math.inf, one_more)

    assert seen[0] == 0
    assert all(seen[1:])
    assert bytes(body[-size:]) == bytes([1]) * size


def test_a_rank_that_is_told_to_leave_does_not_wait_for_a_copy(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    gate = Gate(monkeypatch)
    trained.save(1)
    assert gate.begun.wait(BOUND_S)

    def leave(_: int) -> None:
        raise Aborted("generation 1 is over")

    with pytest.raises(Aborted):
        trained.checkpointer.await_copied(rank, leave)
    gate.open()
    trained.checkpointer.settle()

    assert list(rank.handed) == [1], "the state was not written to, so the copy is good"


def test_a_thread_that_is_stuck_lets_its_process_take_no_other_seat(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    gate = Gate(monkeypatch)
    checkpointer = held_back(trained, 0.05)
    trained.save(1)
    assert gate.begun.wait(BOUND_S)

    with pytest.raises(SaveStuckError, match="stuck at byte"):
        checkpointer.settle()
    gate.open()
    checkpointer._within_s = BOUND_S
    checkpointer.settle()

    assert list(rank.handed) == [1]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_killed_at_any_piece_of_a_copy_has_handed_nothing_over_and_has_the_save_before(
    trained: Trained, rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(1)
    trained.save(1)
    trained.checkpointer.settle()
    lanes, before = trained.checkpointer.lanes(1), rank.slots[0].buffer
    trained.step(2)
    copy, killed = staging.copy_piece, 0

    for number in range(len(list(trained.checkpointer.chunks)) + 1):
        left = [number]

        def kill(target: Any, source: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            copy(target, source)

        monkeypatch.setattr(staging, "copy_piece", kill)
        dying = Checkpointer(trained.training.optimizer.shards, trained.training.world, STAMP)
        assert dying.save(rank, 2, durable=True, overlap=True)
        dying.settle()
        killed += 2 not in rank.handed

    assert killed == number > 20
    assert list(rank.handed) == [1, 2], "only the one that was not killed"
    monkeypatch.setattr(staging, "copy_piece", copy)
    other = Trained(trained.training.world, rank)
    assert other.checkpointer.restore(rank.handed[1], memory_reader(before)) == 1
    assert other.checkpointer.lanes(1) == lanes


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
