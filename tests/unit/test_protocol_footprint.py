"""What a rank is said to hold is what it holds: exactly what lasts, nearly what one pass keeps."""

import msgspec
import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from orchestrator.protocol.footprint import GROUP_MIN, footprint, of_stage
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.runfile import BatchChange, LengthChange, Trainer
from orchestrator.protocol.sizes import PRESETS, ModelConfig, cut_dimension, weight_shapes
from trainer import parallel
from trainer.data import Samples, Tokens
from trainer.model import Block, Llama, next_token_loss
from trainer.reporter import Unheard
from trainer.step import Training

torch.set_num_threads(1)
TINY = ModelConfig(dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=160, vocab=320)
JOB = Trainer(seq_len=96, global_batch=2)


def kept_bytes(recompute: str, dtype: torch.dtype) -> int:
    """Bytes of all storages that the backward pass keeps, those of weights left out."""
    model = Llama(TINY)
    model.init_weights(0)
    model.to(dtype)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.recompute = recompute  # type: ignore[assignment]
    tokens = torch.randint(0, TINY.vocab, (2, 97), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Angles: a CPU has them as complex numbers, one table for each use and not for each sample.
        if storage.data_ptr() not in weights and not tensor.is_complex():
            held[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model(inputs, [[0, 40, 96], [0, 96]]), targets)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "compute"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_those_that_the_backward_pass_keeps_to_two_percent(
    recompute: str, dtype: torch.dtype, compute: int
) -> None:
    job = msgspec.structs.replace(JOB, activation_checkpointing=recompute)
    said = footprint(TINY, job, Layout(), compute=compute)

    kept = kept_bytes(recompute, dtype)

    # Its gradient is made after that.
    gradient = 2 * 96 * TINY.vocab * (4 if compute == 4 else 6)
    assert kept == pytest.approx(said.activations + said.logits - gradient, rel=0.02)


def test_what_lasts_is_exactly_what_a_trainer_holds() -> None:
    with parallel.alone() as world:
        samples = Samples(Tokens(np.arange(500, dtype=np.uint32) % 320, "d16e57000000", 319), JOB)
        training = Training(JOB, TINY, samples, world)
        training.step(1, Unheard())
        shards = training.optimizer.shards
        said = footprint(TINY, JOB, Layout(), compute=4)

        assert said.weights == sum(s.param.nbytes for s in shards)
        assert said.optimizer == sum(s.exp_avg.nbytes + s.exp_avg_sq.nbytes for s in shards)
        assert said.gradients == sum(s.param.grad.nbytes for s in shards)
        assert said.checkpoint == said.weights + said.optimizer
    assert said.gathered == said.accumulated == 0


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_the_first_shard_is_that_of_torch_chunk_and_all_of_them_are_the_model(size: str) -> None:
    model = PRESETS[size]
    for layout in (Layout(dp_shard=7), Layout(dp_shard=16, tp=8), Layout(dp_shard=3, cp=2)):
        held = 0
        for name, shape in weight_shapes(model):
            weight = torch.empty(shape, device="meta")
            if (dim := cut_dimension(name)) is not None:
                weight = weight.chunk(layout.tp, dim)[0]
            held += weight.chunk(layout.dp_shard * layout.cp)[0].numel()
        job = msgspec.structs.replace(JOB, global_batch=layout.readers)

        assert footprint(model, job, layout, compute=2).parameters == held

    assert footprint(model, JOB, Layout(), compute=2).parameters == model.parameters


def test_stages_of_a_pipeline_have_every_weight_once_between_them() -> None:
    model = PRESETS["70B"]
    job = Trainer(seq_len=8192, global_batch=64, micro_batch=1)
    for schedule in ("1F1B", "interleaved"):
        job = msgspec.structs.replace(job, pipeline_schedule=schedule)
        held = [of_stage(model, job, Layout(pp=4), rank, 2) for rank in range(4)]
        assert sum(each.parameters for each in held) == model.parameters
        # Earlier stages wait longer for their backward pass, the last one has the logits.
        assert held[0].activations > held[2].activations
        assert [bool(each.logits) for each in held] == [False, False, False, True]


def test_cutting_a_model_further_leaves_less_on_each_rank() -> None:
    model, job = PRESETS["8B"], Trainer(seq_len=8192, global_batch=64, micro_batch=1)
    whole = footprint(model, job, Layout(), compute=2)

    sharded = footprint(model, job, Layout(dp_shard=8), compute=2)
    cut = footprint(model, job, Layout(tp=8), compute=2)

    assert sharded.weights == whole.weights / 8
    assert sharded.activations == whole.activations
    assert cut.activations < whole.activations / 4
    assert cut.logits < whole.logits / 4
    assert whole.total > sharded.total > 0
    once = msgspec.structs.replace(job, global_batch=8)
    assert footprint(model, once, Layout(dp_shard=8), compute=2).accumulated == 0


def test_sums_in_a_fixed_order_take_a_shard_for_each_level_of_the_tree() -> None:
    job = Trainer(seq_len=8192, global_batch=64, reduction="deterministic")

    found = footprint(PRESETS["8B"], job, Layout(dp_shard=8), compute=2)

    assert found.accumulated == 4 * found.weights  # 8 rounds: of 1, 2, 4 and 8
    fast = msgspec.structs.replace(job, reduction="fast", micro_batch=1)
    whole = footprint(PRESETS["8B"], fast, Layout(dp_shard=8), compute=2)
    assert whole.accumulated == 8 * whole.weights
    ramp = (BatchChange(tokens=1, global_batch=64),)
    later = msgspec.structs.replace(fast, global_batch=8, batch_ramp=ramp)
    assert footprint(PRESETS["8B"], later, Layout(dp_shard=8), compute=2) == whole
    length = (LengthChange(tokens=1, seq_len=4 * later.seq_len),)
    longer = msgspec.structs.replace(later, length_ramp=length)
    found = footprint(PRESETS["8B"], longer, Layout(dp_shard=8), compute=2)
    assert (found.weights, found.activations) == (whole.weights, 4 * whole.activations)


def test_layers_are_gathered_by_themselves_from_the_size_at_which_the_trainer_does_so() -> None:
    assert GROUP_MIN == parallel.SHARD_PARAMETERS_MIN
