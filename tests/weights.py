"""Small models, and weights of them in every layout that is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from storage import shard
from storage.commit import commit, write_shard
from storage.local import LocalStore
from storage.manifest import make_manifest
from tests import runfiles
from trainer.config import ModelConfig, RopeScaling
from trainer.model import Llama
from trainer.weights.convert import convert
from trainer.weights.stored import Box, Stored, Weights

TINY = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=512)
STRETCHED = msgspec.structs.replace(TINY, rope_scaling=RopeScaling())


class Here:
    """A weight that is in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def rows(self, first: int, count: int) -> torch.Tensor:
        return self.tensor[first : first + count].clone()


def model_of(config: ModelConfig = TINY, seed: int = 0) -> Llama:
    model = Llama(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would look the same in any place
                weight.uniform_(0.5, 1.5, generator=generator)
    return model


def weights_of(model: nn.Module, config: ModelConfig = TINY) -> Weights:
    """Return the weights of a model that is in memory."""
    stored = {
        name: Stored(
            shape=tuple(weight.shape),
            boxes=(Box((0,) * weight.ndim, Here(weight.detach())),),
            called=name,
        )
        for name, weight in model.named_parameters()
    }
    return Weights(config, stored, layout="memory", where="here", digest="")


def written(out: Path, layout: str = "hf", config: ModelConfig = TINY, **more: Any) -> Llama:
    """Write the weights of a small model; return it."""
    model = model_of(config)
    convert(weights_of(model, config), out, layout, **more)
    return model


def loaded(weights: Weights) -> Llama:
    """Return a model with these weights."""
    model = Llama(weights.config)
    weights.fill((name, weight, weight.data) for name, weight in model.named_parameters())
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def run_folder(
    root: Path, model: Llama, *, shards: int = 3, step: int = 7, shared: str = "-", **trainer: Any
) -> Path:
    """Return the folder of a run that has a checkpoint of a model, cut as fully_shard cuts it.

    Weights with `shared` in their names are in every shard.
    """
    root.mkdir(exist_ok=True)
    sizes = msgspec.to_builtins(model.config)
    run = runfiles.fields("made", trainer={"model": sizes, **trainer})
    (root / "run.json").write_bytes(msgspec.json.encode(run))
    store = LocalStore(root / "checkpoints")
    receipts = []
    for number in range(shards):
        parts = {}
        for name, weight in model.named_parameters():
            rows = weight.shape[0] if shared in name else -(-weight.shape[0] // shards)
            first = 0 if shared in name else min(number * rows, weight.shape[0])
            part = weight.detach()[first : first + rows].contiguous()
            rest = (0,) * (weight.ndim - 1)
            for state in ("param", "exp_avg"):
                chunk = shard.Chunk(
                    fqn=name,
                    state=state,
                    dtype="F32",
                    shape=tuple(part.shape),
                    global_shape=tuple(weight.shape),
                    offset=(first, *rest),
                )
                parts[chunk.name] = (chunk, part if state == "param" else torch.zeros_like(part))
        layout = shard.plan(chunk for chunk, _ in parts.values())
        body = bytearray(layout.size)
        for name, view in layout.views(body).items():
            view[:] = parts[name][1].reshape(-1).view(torch.uint8).numpy().data
        meta = shard.ShardMeta(
            run_id="made",
            model=model.config.fingerprint,
            step=step,
            epoch=1,
            shard=number,
            shards=shards,
        )
        receipts.append(write_shard(store, shard.seal(layout, body, meta), body))
    manifest = make_manifest(
        receipts, run_id="made", model=model.config.fingerprint, step=step, epoch=1
    )
    commit(store, manifest, newest_epoch_known=1)
    return root


def change_json(path: Path, **fields: Any) -> None:
    """Change fields of a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
