"""What a step is said to have come to."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.protocol import runfile
from orchestrator.protocol.ids import Generation, NodeId, Rank
from orchestrator.protocol.rank import Seat
from orchestrator.protocol.steps import STEPS_FILE
from trainer.config import PRESETS, ModelConfig
from trainer.flops import peak_tflops, train_flops
from trainer.metrics import Figures, open_log
from trainer.model import Llama

CPU = torch.device("cpu")
STEP = Figures(7, 2.5, 0.5, 1e-4, 64, 0.5, 2e12)


def seat(folder: Path, rank: int = 0, generation: int = 3) -> Seat:
    log = str(folder / "rank.log")
    return Seat(
        generation=Generation(generation),
        rank=Rank(rank),
        world_size=2,
        local_rank=rank,
        node=NodeId("node-0"),
        run_id="run",
        job={},
        log=log,
    )


def test_operations_are_those_that_torch_counts_in_products_of_matrices() -> None:
    sizes = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96, vocab=128)
    model = Llama(sizes)
    model.init_weights(0)
    tokens = torch.zeros(1, 32, dtype=torch.int64)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()

    # This way attention computes all pairs, and then leaves out those of the future.
    assert counter.get_total_flops() == train_flops(sizes, 32, 32 * 32)


def test_llama_3_405b_at_its_published_speed_has_its_published_mfu() -> None:
    a_token = train_flops(PRESETS["405B"], 8192, 8192 * 8193 // 2) / 8192

    assert a_token == pytest.approx(6 * 405.85e9, rel=0.04)
    peak = peak_tflops("NVIDIA H100 80GB HBM3")
    assert peak is not None
    assert 400 / peak == pytest.approx(0.41, abs=0.01)
    assert peak_tflops("NVIDIA H200") == 989.5
    assert peak_tflops("an abacus") is None


def test_rank_0_writes_a_line_for_each_step_of_each_generation(tmp_path: Path) -> None:
    for generation in (3, 4):
        with open_log(
            seat(tmp_path, generation=generation), runfile.Trainer(peak_tflops=8), CPU
        ) as note:
            note(STEP)

    lines = [json.loads(line) for line in (tmp_path / STEPS_FILE).read_text().splitlines()]
    assert [line["generation"] for line in lines] == [3, 4]
    assert lines[0] == {
        "generation": 3,
        "step": 7,
        "loss": 2.5,
        "gradNorm": 0.5,
        "learningRate": 1e-4,
        "tokens": 64,
        "seconds": 0.5,
        "tokensPerS": 128.0,
        "tflopsPerGpu": 4.0,
        "mfu": 0.5,
    }


def test_other_ranks_write_nothing_and_mfu_is_not_made_up(tmp_path: Path) -> None:
    with open_log(seat(tmp_path, rank=1), runfile.Trainer(), CPU) as note:
        note(STEP)
    assert not (tmp_path / STEPS_FILE).exists()

    with open_log(seat(tmp_path), runfile.Trainer(), CPU) as note:
        note(STEP)
    assert json.loads((tmp_path / STEPS_FILE).read_text())["mfu"] is None
