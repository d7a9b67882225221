"""The steps that a world of one takes, against plain torch and against each other."""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.worker import MisconfiguredError, RankPhase
from trainer import apply, parallel
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.job import read_job
from trainer.model import Llama, next_token_loss
from trainer.optim import BETAS, EPSILON, learning_rate
from trainer.reporter import Unheard
from trainer.step import Training, Word
from trainer.train import rehearse
from trainer.turns import Turns
from trainer.watch import Watch

CONFIG = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=48, vocab=64)
IDS = np.random.default_rng(3).integers(0, 64, 2000).astype(np.uint32)
SAMPLES_OF = Tokens(IDS, "d16e57000000", 63)


def job(**changes: object) -> runfile.Trainer:
    settings = {"steps": 20, "seq_len": 16, "global_batch": 4, "warmup_steps": 2, **changes}
    return runfile.Trainer(**settings)  # type: ignore[arg-type]


class Recorder(Unheard):
    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.busy_s: list[float] = []

    def step_done(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        busy_s: float = 0.0,
        **_: object,
    ) -> None:
        assert step == len(self.steps) + 1
        assert tokens == 64
        assert seconds > 0
        self.steps.append((loss, grad_norm))
        self.busy_s.append(busy_s)


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


def train(world: parallel.World, trainer: runfile.Trainer, steps: int) -> list[tuple[float, float]]:
    training = Training(trainer, CONFIG, Samples(SAMPLES_OF, trainer), world)
    recorder = Recorder()
    for step in range(1, steps + 1):
        training.step(step, recorder)
    return recorder.steps


def test_a_step_tells_what_it_took_of_the_processor_unless_threads_beside_it_may_spin(
    world: parallel.World,
) -> None:
    training, recorder = Training(job(), CONFIG, Samples(SAMPLES_OF, job()), world), Recorder()
    training.step(1, recorder)
    before_s = time.thread_time()
    training.step(2, recorder)
    spent_s = time.thread_time() - before_s
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    training.step(3, recorder)
    torch.set_num_threads(threads)

    assert 0.5 * spent_s < recorder.busy_s[1] <= spent_s
    assert recorder.busy_s[2] == 0.0


def test_steps_are_those_of_plain_torch(world: parallel.World) -> None:
    trainer = job()
    model = Llama(CONFIG)
    model.init_weights(0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        eps=EPSILON,
    )
    expected = []
    for step in range(1, 6):
        batch = Samples(SAMPLES_OF, trainer).batch(step, range(4))
        inputs, targets = map(torch.tensor, (batch.inputs, batch.targets))
        loss = next_token_loss(model(inputs, batch.cuts), targets) / 64
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, trainer)
        adamw.step()
        expected.append((loss.item(), norm.item()))

    assert train(world, trainer, 5) == [
        (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4)) for loss, norm in expected
    ]


def test_the_same_steps_give_the_same_bits(world: parallel.World) -> None:
    assert train(world, job(), 4) == train(world, job(), 4)
    assert train(world, job(), 4) != train(world, job(seed=1), 4)


def test_a_step_says_which_ranks_can_not_save_with_the_exchange_that_it_makes_anyway(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[int] = []

    def gather(rows: list[torch.Tensor], own: torch.Tensor, **more: object) -> object:
        exchanged.append(len(own))
        return all_gather(rows, own, **more)

    all_gather = torch.distributed.all_gather
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    recorder = Recorder()
    training = Training(job(), CONFIG, Samples(SAMPLES_OF, job()), world)

    answers = [
        training.step(1, recorder),
        training.step(2, recorder, lambda: Word(1)),
        training.step(3, recorder, lambda: Word(2, 5, 1 << 40)),
    ]

    assert answers == [[Word()], [Word(1)], [Word(2, 5, 1 << 40)]]
    assert len(exchanged) == 3
    monkeypatch.undo()
    assert recorder.steps == train(world, job(), 3)


def test_micro_batches_and_layers_sharded_alone_change_the_last_bits_only(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [loss for loss, _ in train(world, job(), 4)]

    apart = [loss for loss, _ in train(world, job(micro_batch=1), 4)]
    monkeypatch.setattr(parallel, "SHARD_PARAMETERS_MIN", 0)
    layered = [loss for loss, _ in train(world, job(), 4)]

    assert apart == pytest.approx(whole, rel=1e-5)
    assert layered == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_has_the_bits_that_it_had(world: parallel.World, what: str) -> None:
    assert train(world, job(activation_checkpointing=what), 4) == train(world, job(), 4)


def test_layers_in_bf16_have_weights_and_state_in_fp32(world: parallel.World) -> None:
    trainer = job(precision="bf16")
    training = Training(trainer, CONFIG, Samples(SAMPLES_OF, trainer), world)
    seen: set[torch.dtype] = set()
    training.stages[0].layers[0].register_forward_hook(lambda *passed: seen.add(passed[2].dtype))
    recorder = Recorder()

    for step in range(1, 5):
        training.step(step, recorder)

    assert seen == {torch.bfloat16}
    assert {s.param.dtype for s in training.optimizer.shards} == {torch.float32}
    assert {s.exp_avg.dtype for s in training.optimizer.shards} == {torch.float32}
    whole = [loss for loss, _ in train(world, job(), 4)]
    coarse = [loss for loss, _ in recorder.steps]
    assert coarse != whole
    assert coarse == pytest.approx(whole, rel=2e-2)


def test_micro_batches_in_bf16_are_added_up_in_fp32(world: parallel.World) -> None:
    whole = [norm for _, norm in train(world, job(precision="bf16"), 4)]
    apart = [norm for _, norm in train(world, job(precision="bf16", micro_batch=1), 4)]

    assert apart == pytest.approx(whole, rel=5e-3)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it compiles
def test_a_model_is_compiled_once_for_all_layers_and_all_worlds_of_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Graphs are the same; making C++ of them and compiling that takes a minute.
    monkeypatch.setattr(apply, "COMPILING", {"fullgraph": True, "backend": "aot_eager"})
    graphs = []
    for _ in range(2):
        with parallel.alone() as world:
            losses = [loss for loss, _ in train(world, job(compile=True), 2)]
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    with parallel.alone() as world:
        plain = [loss for loss, _ in train(world, job(), 2)]

    assert graphs[0] == graphs[1] > 0
    assert losses == pytest.approx(plain, rel=1e-5)


class Hearing(Recorder):
    """Hears of phases, and of what is switched off in which."""

    def __init__(self) -> None:
        super().__init__()
        self.now = RankPhase.WAITING
        self.off: list[tuple[str, str]] = []

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        self.now = phase

    def detector_failed(self, detector: str, reason: str) -> None:
        self.off.append((detector, reason))


def watching(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch, fuse: Callable[..., None], **how: object
) -> Hearing:
    """Train for two steps in which state is digested; other layers compile in no time."""
    monkeypatch.setattr(apply, "COMPILING", {"fullgraph": True, "backend": "eager"})
    monkeypatch.setattr("trainer.step.fuse", fuse)
    trainer = job(**how)
    training = Training(trainer, CONFIG, Samples(SAMPLES_OF, trainer), world)
    training._watch = Watch(training.state(), Turns.fixed(1))
    hearing = Hearing()
    for number in (1, 2):
        training.step(number, hearing)
        hearing.off.append((f"step {number}", hearing.now.name))
    return hearing


@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it compiles
def test_digests_are_compiled_where_layers_are_and_while_the_first_step_may_take_its_time(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, set[torch.dtype]]] = []

    def fuse(device: torch.device, types: set[torch.dtype]) -> None:
        asked.append((device, types))

    plain = watching(world, monkeypatch, fuse)
    assert asked == []
    compiled = watching(world, monkeypatch, fuse, compile=True, precision="bf16")

    assert asked == [(torch.device("cpu"), {torch.float32, torch.bfloat16})]
    for hearing in (plain, compiled):
        assert hearing.off == [("step 1", "WARMING"), ("step 2", "OPTIMIZER")]


@pytest.mark.filterwarnings("ignore")
def test_where_digests_do_not_compile_that_is_said_once_and_training_goes_on(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse(*_: object) -> None:
        raise OSError("no compiler")

    hearing = watching(world, monkeypatch, fuse, compile=True)

    (said, *rest) = hearing.off
    assert said == ("digests in one pass", "OSError: no compiler")
    assert [name for name, _ in rest] == ["step 1", "step 2"]
    assert len(hearing.steps) == 2


def test_ranks_that_read_different_text_are_refused_before_a_weight_moves(
    world: parallel.World,
) -> None:
    training = Training(job(), CONFIG, Samples(SAMPLES_OF, job()), world)

    training._require_same_data([1.0, 1.0])
    with pytest.raises(
        MisconfiguredError, match="rank 0 has other tokens than rank 1, 3"
    ) as caught:
        training._require_same_data([1.0, 2.0, 1.0, 2.0])
    assert caught.value.hint


def test_the_learning_rate_rises_in_a_line_and_falls_to_a_hundredth() -> None:
    trainer = job(steps=100, warmup_steps=10, learning_rate=1.0)

    rates = [learning_rate(step, trainer) for step in range(1, 101)]

    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert math.isfinite(learning_rate(1, job(steps=1, warmup_steps=0)))


def test_an_anneal_goes_from_where_the_cosine_has_come_to_nothing_in_a_line() -> None:
    plain = job(steps=100, warmup_steps=10)
    trainer = job(steps=100, warmup_steps=10, anneal_steps=20)

    rates = [learning_rate(step, trainer) for step in range(1, 101)]

    assert rates[:80] == [learning_rate(step, plain) for step in range(1, 81)]
    assert rates[80:] == pytest.approx([rates[79] * left / 20 for left in range(19, -1, -1)])
    assert learning_rate(1, job(steps=4, anneal_steps=9)) > 0


def test_a_rehearsal_leaves_no_process_group_behind() -> None:
    rehearse()
    rehearse()

    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainer": {"globalBatch": 6}}, "globalBatch is 6, expected a multiple of the 4 ranks"),
        ({"trainer": {"globalBatch": 8, "microBatch": 3}}, "microBatch is 3"),
        (
            {"trainer": {"globalBatch": 6, "reduction": "deterministic"}},
            "globalBatch is 6, expected a multiple of dpShard x microBatch = 4 x 1",
        ),
        (
            {
                "trainer": {"globalBatch": 6, "microBatch": 2, "reduction": "deterministic"},
                "parallelism": {"dpReplicate": 4, "dpShard": 1},
            },
            "3 rounds of dpShard x microBatch = 1 x 2, expected one for each of the 4 replicas",
        ),
        ({"trainer": {"model": "9B"}}, "expected one of debug"),
        ({"trainer": {"tokenizer": "/no/such.tiktoken"}}, "expected a file in tiktoken format"),
        ({"parallelism": {"tp": 4}}, "kvHeads is 2, expected a multiple of tp = 4"),
        ({"parallelism": {"pp": 2}}, "microBatch is 4, which makes 1 of a share of 4"),
        (
            {"parallelism": {"dpReplicate": 3}},
            "dpReplicate 3 x dpShard 1, expected 4 ranks",
        ),
        (
            {"parallelism": {"dpReplicate": 8}},
            "dpReplicate 8 x dpShard 1, expected 4 ranks",
        ),
    ],
)
def test_a_job_that_can_not_run_is_refused_with_a_hint(
    change: dict[str, object], says: str
) -> None:
    with pytest.raises(MisconfiguredError) as caught:
        read_job(change, 4)

    assert says in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("ranks", "mesh"), [(8, (4, 2)), (6, (3, 2)), (4, (2, 2)), (2, (1, 2)), (1, None), (5, None)]
)
def test_a_world_may_have_fewer_replicas_than_the_run_asks_for_but_each_of_them_whole(
    ranks: int, mesh: tuple[int, int] | None
) -> None:
    asked = {"parallelism": {"dpReplicate": 4, "dpShard": 2}, "trainer": {"globalBatch": 16}}

    if mesh is not None:
        read = read_job(asked, ranks)
        assert read.layout == Layout(dp_replicate=mesh[0], dp_shard=mesh[1])
        assert read.trainer.micro_batch == 2, "a rank needs more memory in a smaller world"
    else:
        with pytest.raises(
            MisconfiguredError, match=f"dpReplicate 4 x dpShard 2, expected {ranks} ranks"
        ):
            read_job(asked, ranks)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MisconfiguredError, match="expected at least 1 GPUs, found 0"):
        parallel.device_of("cuda", 0)
    assert parallel.device_of("auto", 0).type == "cpu"
