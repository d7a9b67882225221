"""A shard goes out and comes back; what is not this run's is refused."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.worker import MisconfiguredError, Slot
from storage.digest import combine
from storage.errors import ShardCorruptError
from storage.filling import memory_reader
from storage.shard import decode_index
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.optim import ShardState
from trainer.reporter import Unheard
from trainer.stamp import Cursor, Stamp
from trainer.step import Training

CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=32)
JOB = runfile.Trainer(steps=20, seq_len=8, global_batch=2)
TOKENS = Tokens(np.arange(500, dtype=np.uint32) % 32, "d16e57000000", 31)
CURSOR = Cursor(samples=0, seed=0, seq_len=8, global_batch=2, data="d16e57000000")
STAMP = Stamp("run", CONFIG.fingerprint, 1, CURSOR)


class Agent:
    """Takes one shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slots = 1
        self.index = ""
        self.stalled_s = 0.0
        self.taken: Slot | None = None
        self.busy = False

    def slot(self, size: int) -> Slot | None:
        if not self.slots:
            return None
        self.slots -= 1
        self.taken = Slot(0, self.folder / "slot", size)
        return self.taken

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        assert (slot.number, generation) == (0, 1)
        self.index = index

    def give_back(self, slot: Slot) -> None:
        raise AssertionError(slot.number)

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        raise AssertionError(reason)

    def stalled(self, seconds: float) -> None:
        self.stalled_s += seconds

    @property
    def persisting(self) -> bool:
        return self.busy


class Trained:
    def __init__(self, world: parallel.World, stamp: Stamp = STAMP, *, empty: bool = False) -> None:
        self.training = Training(JOB, CONFIG, Samples(TOKENS, JOB), world, empty=empty)
        self.checkpointer = Checkpointer(self.training.optimizer.shards, world, stamp)

    def steps(self, *steps: int) -> None:
        for step in steps:
            self.training.step(step, Unheard())


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def saved(world: parallel.World, agent: Agent, *, steps: int = 3) -> tuple[Trained, memoryview]:
    trained = Trained(world)
    trained.steps(*range(1, steps + 1))
    assert trained.checkpointer.save(agent, steps, durable=False)
    trained.checkpointer.settle()
    assert agent.taken is not None
    return trained, agent.taken.buffer


def test_a_restored_run_goes_on_with_the_bits_of_the_one_that_was_saved(
    world: parallel.World, agent: Agent
) -> None:
    trained, body = saved(world, agent)
    trained.steps(4, 5)

    other = Trained(world, empty=True)
    done = other.checkpointer.restore(agent.index, memory_reader(body))
    other.training.optimizer.set_steps(done)
    other.steps(4, 5)

    assert done == 3
    assert other.checkpointer.lanes(5) == trained.checkpointer.lanes(5)
    assert agent.stalled_s > 0


def test_a_shard_says_where_the_run_stands_in_its_data(world: parallel.World, agent: Agent) -> None:
    saved(world, agent)

    index = decode_index(agent.index.encode())

    assert msgspec.convert(index.extra, Cursor) == msgspec.structs.replace(CURSOR, samples=6)
    assert (index.step, index.epoch, index.run_id) == (3, 1, "run")
    assert {chunk.state for chunk in index.chunks} == {"param", "exp_avg", "exp_avg_sq"}


def test_a_save_without_a_free_slot_is_skipped(world: parallel.World, agent: Agent) -> None:
    trained, _ = saved(world, agent)

    assert not trained.checkpointer.save(agent, 4, durable=True)


def test_a_slot_stays_claimed_until_a_save_fills_it(world: parallel.World, agent: Agent) -> None:
    trained = Trained(world)

    assert trained.checkpointer.claim(agent)
    assert trained.checkpointer.claim(agent)
    assert agent.slots == 0
    assert trained.checkpointer.save(agent, 1, durable=False)
    trained.checkpointer.settle()

    assert decode_index(agent.index.encode()).step == 1
    assert not trained.checkpointer.claim(agent)


def test_the_state_digest_changes_with_a_weight_with_the_step_and_with_the_data(
    world: parallel.World,
) -> None:
    trained = Trained(world)
    before = trained.checkpointer.lanes(1)
    other_data = STAMP._replace(start=msgspec.structs.replace(CURSOR, data="other"))

    assert trained.checkpointer.lanes(2) != before
    assert Trained(world, other_data).checkpointer.lanes(1) != before
    trained.training.optimizer.shards[0].exp_avg.view(-1)[0] = 1.0
    assert trained.checkpointer.lanes(1) != before


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (3, 3)])
def test_the_state_digest_does_not_depend_on_the_sharding(shape: tuple[int, int]) -> None:
    weights = {"a": torch.arange(30.0).reshape(5, 6), "b": torch.arange(7.0)}
    digests = [_digest_over(weights, mesh) for mesh in ((1, 1), shape)]

    assert digests[0] == digests[1]


def _digest_over(weights: dict[str, torch.Tensor], shape: tuple[int, int]) -> tuple[int, int]:
    lanes = []
    for rank in range(shape[0] * shape[1]):
        layout = Layout(dp_replicate=shape[0], dp_shard=shape[1])
        world = parallel.World(rank, layout, torch.device("cpu"))
        shards = []
        for name, weight in weights.items():
            parts = weight.chunk(shape[1])
            part = parts[world.shard] if world.shard < len(parts) else weight[:0]
            shards.append(ShardState(name, torch.nn.Parameter(weight), part, part + 1, part + 2))
        lanes.append(Checkpointer(shards, world, STAMP).lanes(1))
        world.close()
    return combine(lanes)


@pytest.mark.parametrize(
    ("stamp", "says"),
    [
        (STAMP._replace(run_id="other"), "run is run, expected other"),
        (STAMP._replace(model="f" * 16), "model is"),
        (
            STAMP._replace(start=msgspec.structs.replace(CURSOR, data="new")),
            "data is d16e57000000, expected new",
        ),
        (STAMP._replace(start=msgspec.structs.replace(CURSOR, seed=7)), "seed is 0, expected 7"),
        (
            STAMP._replace(start=msgspec.structs.replace(CURSOR, global_batch=4)),
            "samples is 6, expected 12",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(
    world: parallel.World, agent: Agent, stamp: Stamp, says: str
) -> None:
    _, body = saved(world, agent)
    other = Trained(world, stamp)
    before = other.checkpointer.lanes(0)

    with pytest.raises(MisconfiguredError) as caught:
        other.checkpointer.restore(agent.index, memory_reader(body))

    assert other.checkpointer.lanes(0) == before

    assert says in str(caught.value)
    assert "step 3" in str(caught.value)
    assert caught.value.hint


def test_a_flipped_bit_is_found_in_what_arrived_and_nobody_goes_on_from_it(
    world: parallel.World, agent: Agent
) -> None:
    _, body = saved(world, agent)
    (last,) = struct.unpack("<B", body[-1:])
    body[-1:] = struct.pack("<B", last ^ 1)

    with pytest.raises(ShardCorruptError, match="xxh3-128"):
        Trained(world).checkpointer.restore(agent.index, memory_reader(body))


def test_bytes_that_change_on_the_way_into_the_state_are_found_there(
    world: parallel.World, agent: Agent
) -> None:
    _, body = saved(world, agent)
    read = memory_reader(body)

    def other_memory(start: int, buffer: memoryview) -> int:
        count = read(start, buffer)
        buffer[0] ^= start >= len(body) - 64
        return count

    with pytest.raises(ShardCorruptError, match="xxh3-128"):
        Trained(world).checkpointer.restore(agent.index, other_memory)


def test_a_tensor_whose_bytes_do_not_lie_in_a_row_is_refused_instead_of_left_as_it_was(
    world: parallel.World, agent: Agent
) -> None:
    trained, body = saved(world, agent)
    shards = trained.training.optimizer.shards
    place = next(i for i, s in enumerate(shards) if s.param.ndim == 2)
    turned = torch.zeros(tuple(shards[place].param.shape)[::-1]).t()
    others = [*shards[:place], shards[place]._replace(param=turned), *shards[place + 1 :]]

    with pytest.raises(ValueError, match=r"strides are \(1, \d+\) .* expected a contiguous one"):
        Checkpointer(others, world, STAMP).restore(agent.index, memory_reader(body))


def test_a_save_while_the_one_before_is_digested_is_skipped(
    world: parallel.World, agent: Agent
) -> None:
    import threading  # noqa: PLC0415 - only here

    gate = threading.Event()

    class Slow(Agent):
        def staged(self, slot: Slot, **_: object) -> None:
            gate.wait(10)

    slow = Slow(agent.folder)
    slow.slots = 2
    trained = Trained(world)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(trained.checkpointer.settle)
        stack.callback(gate.set)

        assert trained.checkpointer.save(slow, 1, durable=False)
        assert not trained.checkpointer.claim(slow)
        assert not trained.checkpointer.save(slow, 2, durable=False)
        assert slow.slots == 1
