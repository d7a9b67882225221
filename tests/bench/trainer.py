"""How fast the embedded trainer is, against Hugging Face's Llama of the same shapes.

    python -m tests.bench.trainer [--device cpu|cuda] [--json]

On a CPU: two ranks, float32; both models live in the same two processes and take turns, so that
drifts of the machine meet both alike. Ours is the product's own `Training` over two shards, with
documents apart; theirs is `LlamaForCausalLM` under DistributedDataParallel with scaled-dot-product
attention over the whole sequence, the same optimizer, decay, clipping and tokens.

On a GPU: one rank, the shapes of the 8B model with as many layers as asked for, sequences of
8,192 tokens of several documents each, bf16 with float32 weights. Both do not fit side by side:
each has a process of its own, one after the other, and measures the device's own products of
matrices first. Theirs runs in autocast, compiled layer by layer and as a whole, of which the faster
counts, with causal attention over the whole sequence: it does not keep documents apart.

Operations are counted by `trainer.flops` for ours, pairs within documents only; tokens per second
are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from tests.bench import ending
from trainer import parallel
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.flops import train_flops
from trainer.metrics import Figures
from trainer.optim import BETAS, EPSILON
from trainer.reporter import Unheard
from trainer.step import Training

SMALL = ModelConfig(dim=256, layers=4, heads=8, kv_heads=4, ffn_dim=768, vocab=4096)
SMALL_JOB = runfile.Trainer(steps=10_000, seq_len=256, global_batch=8, device="cpu")
LARGE_JOB = runfile.Trainer(
    steps=10_000, seq_len=8192, global_batch=8, micro_batch=1, device="cuda", peak_tflops=1.0
)
Step = Callable[[int], None]
"""Takes the step of this number, on this rank, and waits for it."""


def large(layers: int) -> ModelConfig:
    """Return the 8B model with fewer layers."""
    return ModelConfig(dim=4096, layers=layers, heads=32, kv_heads=8, ffn_dim=14_336)


def samples(config: ModelConfig, job: runfile.Trainer, steps: int) -> Samples:
    """Return random text: documents of a sixteenth of a sequence to a whole one, mostly short."""
    chance = np.random.default_rng(0)
    count = job.seq_len * job.global_batch * steps + 1
    ids = chance.integers(0, config.vocab - 1, count, dtype=np.uint32)
    bos, at = config.vocab - 1, 0
    while at < count:
        ids[at] = bos
        at += int(math.exp(chance.uniform(math.log(job.seq_len / 16), math.log(job.seq_len))))
    return Samples(Tokens(ids, "0" * 32, bos), job)


def ours(
    config: ModelConfig, job: runfile.Trainer, text: Samples, world: parallel.World
) -> tuple[Step, list[Figures]]:
    """Return the product's own step, and a list to which it adds what each came to."""
    noted: list[Figures] = []
    empty = world.device.type == "cuda"  # drawing billions of weights would take minutes
    training = Training(job, config, text, world, empty=empty, note=noted.append)
    if empty:
        _fill(training)
    return lambda step: training.step(step, Unheard()) and None, noted


@torch.no_grad()
def _fill(training: Training) -> None:
    for shard in training.optimizer.shards:
        shard.param.fill_(1.0) if shard.weight.ndim == 1 else shard.param.normal_(0.0, 0.02)


def theirs(
    config: ModelConfig,
    job: runfile.Trainer,
    text: Samples,
    world: parallel.World,
    *,
    whole: bool = False,
) -> Step:
    """Return a step of Hugging Face's model on the same tokens.

    On a GPU either the model is compiled as a whole, or its layers and its loss by themselves.
    """
    cuda = world.device.type == "cuda"
    with world.device:
        model = _hugging_face(config, job.seq_len)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": job.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=job.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        **{"fused" if cuda else "foreach": True},
    )
    share = job.global_batch // world.size
    size = job.micro_batch or share
    run: Callable[..., Any]
    if cuda and whole:
        run = torch.compile(model, dynamic=False)
    elif cuda:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        model.loss_function = torch.compile(model.loss_function, dynamic=False)
        run = model
    else:
        run = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(number: int) -> None:
        for first in range(world.rank * share, (world.rank + 1) * share, size):
            batch = text.batch(number, range(first, first + size))
            inputs, targets = (_sent(ids, world.device) for ids in (batch.inputs, batch.targets))
            with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
                # They shift labels themselves, unless they are given as shifted already.
                loss = run(input_ids=inputs, labels=targets, shift_labels=targets).loss
            (loss * size / share).backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def _hugging_face(config: ModelConfig, length: int) -> Any:
    import transformers  # noqa: PLC0415 - takes seconds, which a GPU need not wait for

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    return model.float().train()


def _sent(ids: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# On a CPU -------------------------------------------------------------------------------------


def rank_on_cpu(rank: int, meet: Path, rounds: int) -> None:
    """Take turns with both models; rank 0 prints seconds of each step, by round."""
    world = parallel.World(rank, Layout(dp_shard=2), parallel.device_of("cpu", 0))
    world.join(dist.FileStore(str(meet), 2), 600.0)
    text = samples(SMALL, SMALL_JOB, 64)
    step, _ = ours(SMALL, SMALL_JOB, text, world)
    turns = {"ours": step, "theirs": theirs(SMALL, SMALL_JOB, text, world)}
    for take in turns.values():
        take(1)
        take(2)
    number = 3
    for turn in range(rounds):
        taken = {}
        for name in sorted(turns, reverse=bool(turn % 2)):
            dist.barrier()
            begun, worked = time.monotonic(), time.process_time()
            for at in range(4):
                turns[name](number + at)
            taken[name] = (time.monotonic() - begun) / 4
            taken[f"{name}_cpu"] = (time.process_time() - worked) / 4
        number += 4
        if rank == 0:
            print(json.dumps(taken), flush=True)
    world.close()
    dist.barrier()
    # Groups are torn down by the end of the process: see trainer.parallel.
    os._exit(0)


def on_cpu(rounds: int) -> dict[str, Any]:
    """Return tokens per second of both over two ranks, and the ratio of each round."""
    with ending.new_folder() as folder:
        ranks = [
            subprocess.Popen(
                _child("--rank", str(rank), "--meet", f"{folder}/meet", "--rounds", str(rounds)),
                env=dict(os.environ, OMP_NUM_THREADS="1"),
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        out, _ = ranks[0].communicate()
        codes = [rank.wait() for rank in ranks]
    if codes != [0, 0]:
        raise RuntimeError(f"ranks ended with {codes}")
    turns = [json.loads(line) for line in out.splitlines()]
    tokens = SMALL_JOB.global_batch * SMALL_JOB.seq_len
    return {
        "device": "cpu",
        "rounds": rounds,
        "ours_tokens_s": tokens / statistics.median(turn["ours"] for turn in turns),
        "theirs_tokens_s": tokens / statistics.median(turn["theirs"] for turn in turns),
        "ratio": statistics.median(turn["theirs"] / turn["ours"] for turn in turns),
        "ratios": sorted(turn["theirs"] / turn["ours"] for turn in turns),
        # What rank 0 computed, without what it waited: says more where others use the cores, too.
        "ratio_of_cpu_time": statistics.median(t["theirs_cpu"] / t["ours_cpu"] for t in turns),
    }


# On a GPU -------------------------------------------------------------------------------------


def side_on_gpu(side: str, layers: int, recompute: str, steps: int) -> None:
    """Train one of the two by itself, and print what it came to."""
    torch.manual_seed(0)
    peak, sustained = _peak_tflops()
    config = large(layers)
    job = runfile.Trainer(
        **{
            **{name: getattr(LARGE_JOB, name) for name in LARGE_JOB.__struct_fields__},
            "activation_checkpointing": recompute,
        }
    )
    text = samples(config, job, steps + 2)
    with parallel.alone(device="cuda") as world:
        begun = time.monotonic()
        noted: list[Figures] = []
        if side == "ours":
            take, noted = ours(config, job, text, world)
        else:
            take = theirs(config, job, text, world, whole=side == "theirs whole")
        take(1)
        first_s = time.monotonic() - begun
        take(2)
        torch.cuda.synchronize()
        seconds = []
        for step in range(3, steps + 3):
            begun = time.monotonic()
            take(step)
            seconds.append(time.monotonic() - begun)
        torch.cuda.synchronize()
    step_s = statistics.median(seconds)
    tokens = job.global_batch * job.seq_len
    pairs = job.global_batch * job.seq_len * (job.seq_len + 1) // 2
    flops = [note.flops for note in noted[2:]] or [train_flops(config, tokens, pairs)] * steps
    result = {
        "side": side,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": layers,
        "recompute": recompute,
        "tokens_of_a_step": tokens,
        "first_step_s": first_s,
        "step_s": step_s,
        "steps_s": seconds,
        "tokens_s": tokens / step_s,
        "tflops": statistics.median(f / s for f, s in zip(flops, seconds, strict=True)) / 1e12,
        "matmul_tflops": peak,
        "matmul_sustained_tflops": sustained,
        "losses": [note.loss.hex() for note in noted],
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    print(json.dumps(result), flush=True)


def _peak_tflops() -> tuple[float, float]:
    """Return TFLOPS of products of 8192 x 8192 bf16 matrices: of one, and over two seconds."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def seconds(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            a @ b
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    seconds(3)
    flops = 2 * 8192**3 / 1e12
    return flops / statistics.median(seconds(1) for _ in range(10)), flops / seconds(1200)


def on_gpu(layers: int, recompute: str, steps: int, limit_s: float) -> dict[str, Any]:
    """Return what both came to, one after the other, and their ratio."""
    sides = {}
    for side in ("ours", "theirs layers", "theirs whole"):
        options = ("--layers", str(layers), "--recompute", recompute, "--steps", str(steps))
        done = subprocess.run(
            _child("--side", side, *options),
            env=dict(os.environ, PYTORCH_ALLOC_CONF="expandable_segments:True"),
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit_s,
            check=True,
        )
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(sides[side]), file=sys.stderr, flush=True)
    mine = sides["ours"]
    best = max(side["tokens_s"] for name, side in sides.items() if name != "ours")
    return {
        "device": mine["gpu"],
        "tflops": mine["tflops"],
        "share_of_matmul_peak": mine["tflops"] / mine["matmul_tflops"],
        "best_of_theirs_tokens_s": best,
        "ratio": mine["tokens_s"] / best,
        **sides,
    }


def _child(*options: str) -> list[str]:
    return [sys.executable, "-u", "-m", "tests.bench.trainer", *options]


def main() -> None:
    """Measure, and print how many tokens per second each has, and their ratio."""
    arguments = _arguments()
    if arguments.rank is not None:
        rank_on_cpu(arguments.rank, arguments.meet, arguments.rounds)
    elif arguments.side:
        side_on_gpu(arguments.side, arguments.layers, arguments.recompute, arguments.steps)
    elif arguments.device == "cpu":
        result = on_cpu(arguments.rounds)
        _print(
            result,
            f"2 ranks on a CPU: ours {result['ours_tokens_s']:.0f} tokens/s, Hugging Face and DDP "
            f"{result['theirs_tokens_s']:.0f}; ratio {result['ratio']:.3f} (median of "
            f"{result['rounds']} rounds, {result['ratios'][0]:.3f} to {result['ratios'][-1]:.3f}); "
            f"of CPU time {result['ratio_of_cpu_time']:.3f}",
            as_json=arguments.json,
        )
    else:
        limit_s = arguments.limit
        result = on_gpu(arguments.layers, arguments.recompute, arguments.steps, limit_s)
        mine = result["ours"]
        _print(
            result,
            f"{result['device']}, {mine['layers']} layers of the 8B model: {mine['tflops']:.0f} "
            f"TFLOPS, {result['share_of_matmul_peak']:.2f} of {mine['matmul_tflops']:.0f} (one "
            f"product; {mine['matmul_sustained_tflops']:.0f} over two seconds); "
            f"{mine['tokens_s']:.0f} tokens/s, Hugging Face compiled "
            f"{result['best_of_theirs_tokens_s']:.0f}; ratio {result['ratio']:.2f}",
            as_json=arguments.json,
        )


def _print(result: dict[str, Any], words: str, *, as_json: bool) -> None:
    print(json.dumps(result, indent=2) if as_json else words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each, on a CPU")
    parser.add_argument("--layers", type=int, default=8, help="of the 8B model, on a GPU")
    parser.add_argument("--recompute", default="none", help="activationCheckpointing, on a GPU")
    parser.add_argument("--steps", type=int, default=5, help="measured, on a GPU")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a side on a GPU")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
