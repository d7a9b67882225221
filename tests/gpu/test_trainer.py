"""The trainer on a GPU: the same steps again, with the same bits, and documents apart."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.worker import Slot
from storage.filling import memory_reader
from trainer import apply, parallel
from trainer.checkpoint import Checkpointer
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.documents import attend, looking, per_document
from trainer.embedding import Embedding
from trainer.reporter import Unheard
from trainer.stamp import Cursor, Stamp
from trainer.step import Training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU here"),
    pytest.mark.filterwarnings("default"),  # torch warns of its own doings while it compiles
]
CONFIG = ModelConfig(dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=512, vocab=1024)
IDS = np.random.default_rng(3).integers(0, 1000, 40_000).astype(np.uint32)
IDS[np.random.default_rng(4).integers(0, len(IDS), 200)] = 1001
TOKENS = Tokens(IDS, "d16e57000000", 1001)
STAMP = Stamp(
    "run",
    CONFIG.fingerprint,
    1,
    Cursor(samples=0, seed=0, seq_len=384, global_batch=4, data=TOKENS.digest),
)


def job(**changes: object) -> runfile.Trainer:
    settings = {"steps": 20, "seq_len": 384, "global_batch": 4, "micro_batch": 2, **changes}
    return runfile.Trainer(**settings)  # type: ignore[arg-type]


class Recorder(Unheard):
    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def step_done(
        self, step: int, *, loss: float, grad_norm: float, tokens: int, seconds: float, **_: object
    ) -> None:
        self.steps.append((loss.hex(), grad_norm.hex()))


class Agent:
    """Takes one shard."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index, self.taken = folder, "", Slot(0, folder / "none", 8)
        self.persisting = False

    def slot(self, size: int) -> Slot | None:
        self.taken = Slot(0, self.folder / "slot", size)
        return self.taken

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        self.index = index

    def give_back(self, slot: Slot) -> None:
        raise AssertionError(slot.number)

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        raise AssertionError(reason)

    def stalled(self, seconds: float) -> None:
        assert seconds >= 0


class Trained:
    def __init__(
        self, world: parallel.World, *, empty: bool = False, trainer: runfile.Trainer | None = None
    ) -> None:
        trainer = trainer or job()
        self.training = Training(trainer, CONFIG, Samples(TOKENS, trainer), world, empty=empty)
        self.checkpointer = Checkpointer(self.training.optimizer.shards, world, STAMP)
        self.recorder = Recorder()

    def steps(self, *steps: int) -> "Trained":
        for step in steps:
            self.training.step(step, self.recorder)
        return self


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone(device="cuda") as world:
        yield world


@pytest.mark.parametrize("how", ["compiled", "by itself"])
def test_one_kernel_over_blocks_gives_what_each_document_gives_alone(how: str) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    device = torch.device("cuda", 0)
    cuts = [[0, 5, 130, 131, 700], [0, 700]]

    def drawn(heads: int) -> torch.Tensor:
        shape = (2, heads, 700, 64)
        return torch.randn(shape, generator=generator, device=device, requires_grad=True)

    q, k, v = drawn(4), drawn(2), drawn(2)
    towards = torch.randn(q.shape, generator=generator, device=device)
    blocks = looking(cuts, 700, device)
    kernel = torch.compile(attend, dynamic=False) if how == "compiled" else attend

    together = kernel(q, k, v, blocks)
    apart = per_document(q, k, v, cuts)

    torch.testing.assert_close(together, apart, atol=1e-2, rtol=1e-2)
    for mine, theirs in zip(
        torch.autograd.grad(together, (q, k, v), towards),
        torch.autograd.grad(apart, (q, k, v), towards),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


def test_the_gradient_of_few_words_that_come_often_has_the_same_bits_each_time() -> None:
    chance = torch.Generator("cuda").manual_seed(0)
    embedding = Embedding(64, 128, device="cuda")
    words = torch.randint(0, 8, (16_384,), generator=chance, device="cuda")
    towards = torch.randn(16_384, 128, generator=chance, device="cuda")

    gradients = [
        torch.autograd.grad(embedding(words), embedding.weight, towards)[0] for _ in range(8)
    ]

    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    exact = torch.zeros(64, 128, dtype=torch.float64, device="cuda")
    exact = exact.index_add(0, words, towards.double())
    torch.testing.assert_close(gradients[0].double(), exact, atol=1e-3, rtol=1e-4)


def test_the_same_steps_give_the_same_bits(world: parallel.World) -> None:
    one = Trained(world).steps(1, 2, 3, 4)
    again = Trained(world).steps(1, 2, 3, 4)

    assert one.recorder.steps == again.recorder.steps
    assert one.checkpointer.lanes(4) == again.checkpointer.lanes(4)
    other = Trained(world, trainer=job(seed=1)).steps(1, 2, 3, 4)
    assert one.checkpointer.lanes(4) != other.checkpointer.lanes(4)


def test_a_gpu_computes_in_bf16_and_compiles_unless_it_is_told_otherwise(
    world: parallel.World,
) -> None:
    assert apply.precision(job(), world.device) is torch.bfloat16
    assert apply.compiles(job(), world.device)

    fast = Trained(world).steps(1, 2, 3)
    plain = Trained(world, trainer=job(precision="fp32", compile=False)).steps(1, 2, 3)

    for (loss, _), (exact, _) in zip(fast.recorder.steps, plain.recorder.steps, strict=True):
        assert float.fromhex(loss) == pytest.approx(float.fromhex(exact), rel=5e-3)


@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_changes_roundings_only(world: parallel.World, what: str) -> None:
    kept = Trained(world).steps(1, 2)
    again = Trained(world, trainer=job(activation_checkpointing=what)).steps(1, 2)

    for (loss, _), (other, _) in zip(kept.recorder.steps, again.recorder.steps, strict=True):
        assert float.fromhex(loss) == pytest.approx(float.fromhex(other), rel=2e-3)


def test_a_step_waits_for_the_gpu_once(world: parallel.World) -> None:
    trained = Trained(world).steps(1, 2)
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            trained.steps(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    told = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
    assert len(told) == 1, told


def test_a_world_that_is_formed_again_restores_and_goes_on_with_the_same_bits(
    tmp_path: Path,
) -> None:
    agent = Agent(tmp_path)
    with parallel.alone(device="cuda") as world:
        trained = Trained(world).steps(1, 2, 3)
        assert trained.checkpointer.save(agent, 3, durable=False)
        trained.checkpointer.settle()
        trained.steps(4, 5)
        lanes = trained.checkpointer.lanes(5)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    with parallel.alone(device="cuda") as world:
        other = Trained(world, empty=True)
        done = other.checkpointer.restore(agent.index, memory_reader(agent.taken.buffer))
        other.training.optimizer.set_steps(done)
        other.steps(4, 5)

        assert done == 3
        assert other.recorder.steps == trained.recorder.steps[3:]
        assert other.checkpointer.lanes(5) == lanes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
