"""Writes weights in a public layout, tensor by tensor, into a folder that is whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from torch import Tensor

from orchestrator.worker import MisconfiguredError
from trainer.config import ModelConfig, RopeScaling
from trainer.outputs import placing, require_folder
from trainer.weights import names, safetensors, tensorzip
from trainer.weights.names import Shape
from trainer.weights.safetensors import Planned
from trainer.weights.sources import ffn_dim
from trainer.weights.stored import Weights, halves, require_finite

FILE_BYTES = 5_000_000_000
"""A safetensors file takes tensors up to this, as published ones do."""
LAYOUTS = ("hf", "meta")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(
    weights: Weights,
    out: Path,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    parts: int = 1,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write weights into a new folder.

    Args:
        weights: of any layout.
        out: folder; there when it is whole, and not before.
        layout: one of LAYOUTS.
        dtype: of what is written; None for that of each weight.
        parts: files of Meta's layout, as many as the tensor-parallel ranks that it is made for.
        file_bytes: tensors in a file of Hugging Face's layout take at most so much, or one does.

    Raises:
        MisconfiguredError: if there is something at `out`, the weights can not be cut into as many
            parts, or are not what they should be.
    """
    with _folder(out) as unfinished:
        if layout == "hf":
            _write_hugging_face(weights, unfinished, dtype, file_bytes)
        else:
            _write_meta(weights, unfinished, dtype, parts)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    with placing(out):
        # A link counts, also one to nothing: no folder could take its place.
        there = out.is_symlink() or out.exists()
    if there:
        raise MisconfiguredError(
            f"something is there already: {out}", hint="choose a folder that is not there yet"
        )
    require_folder(out)
    unfinished = out.absolute().with_name(f".{out.name}.{os.getpid()}")
    with placing(out):
        unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, told: dict[str, Any]) -> None:
    with _file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")


def _planned(
    weights: Weights, naming: names.Naming, dtype: torch.dtype | None, cut: tuple[int, int]
) -> Iterator[Planned]:
    """Yield what one part of so many has, in the order in which it is used.

    Args:
        weights: from which it is made.
        naming: of what is written.
        dtype: None for that of each weight.
        cut: number of the part, and how many there are.
    """
    config = weights.config
    for name, whole in names.shapes(config):
        offset, shape = _box(name, whole, *cut)
        wanted = dtype or weights.stored[name].dtype
        turned = config.head_dim if naming.halves and names.is_rotated(name) else 0
        make = partial(_made, weights, name, offset, shape, wanted, turned)
        yield Planned(naming.theirs(name), shape, wanted, make)


def _made(
    weights: Weights, name: str, offset: Shape, shape: Shape, dtype: torch.dtype, turned: int
) -> Tensor:
    tensor = weights.read(name, offset, shape)
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
        require_finite(tensor, f"{name} as {dtype}: {weights.where}")
    return halves(tensor, turned) if turned else tensor.contiguous()


def _box(name: str, whole: Shape, part: int, parts: int) -> tuple[Shape, Shape]:
    dim = names.cut_dimension(name)
    if dim is None:
        return (0,) * len(whole), whole
    size, rest = divmod(whole[dim], parts)
    if rest:
        raise MisconfiguredError(
            f"{name} of shape {list(whole)} can not be cut into {parts} equal parts",
            hint="choose fewer --parts",
        )
    offset = tuple(part * size if d == dim else 0 for d in range(len(whole)))
    return offset, tuple(size if d == dim else n for d, n in enumerate(whole))


# Hugging Face ---------------------------------------------------------------------------------


def _write_hugging_face(
    weights: Weights, out: Path, dtype: torch.dtype | None, file_bytes: int
) -> None:
    groups: list[list[Planned]] = [[]]
    for tensor in _planned(weights, names.HUGGING_FACE, dtype, (0, 1)):
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    files = [f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    if len(files) == 1:
        files = ["model.safetensors"]
    for name, group in zip(files, groups, strict=True):
        with _file(out / name) as file:
            safetensors.write(file, group)
    kinds = {tensor.dtype for group in groups for tensor in group}
    _write_json(out / "config.json", _hugging_face_config(weights.config, kinds))
    if len(files) > 1:
        placed = {t.name: file for file, group in zip(files, groups, strict=True) for t in group}
        total = sum(tensor.nbytes for group in groups for tensor in group)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        _write_json(out / "model.safetensors.index.json", index)


def _hugging_face_config(config: ModelConfig, kinds: set[torch.dtype]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # The tokenizer gives its first special tokens to the begin and end of a text.
        "bos_token_id": config.vocab - 256,
        "eos_token_id": config.vocab - 255,
        # As released: how many positions were trained.
        "max_position_embeddings": 131_072 if config.rope_scaling else 8192,
    }
    if len(kinds) == 1:
        told["torch_dtype"] = str(next(iter(kinds))).removeprefix("torch.")
    if (scaling := config.rope_scaling) is not None:
        told["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return told


# Meta -----------------------------------------------------------------------------------------


def _write_meta(weights: Weights, out: Path, dtype: torch.dtype | None, parts: int) -> None:
    if weights.config.kv_heads % parts:
        raise MisconfiguredError(
            f"--parts is {parts}, expected a divisor of the {weights.config.kv_heads} kvHeads",
            hint="each part has whole heads",
        )
    params = _meta_params(weights.config)
    for part in range(parts):
        with _file(out / f"consolidated.{part:02d}.pth") as file:
            tensorzip.write(file, _planned(weights, names.META, dtype, (part, parts)))
    _write_json(out / "params.json", params)


def _meta_params(config: ModelConfig) -> dict[str, Any]:
    told: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_width(config),
    }
    if (scaling := config.rope_scaling) is not None:
        sayable = RopeScaling(factor=scaling.factor, high_freq_factor=scaling.high_freq_factor)
        if scaling != sayable:
            raise MisconfiguredError(
                f"lowFreqFactor is {scaling.low_freq_factor:g} and originalLength "
                f"{scaling.original_length}, expected 1 and 8192",
                hint="params.json has no place for others: take the layout of Hugging Face",
            )
        told |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": scaling.factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
        }
    return told


def _width(config: ModelConfig) -> dict[str, Any]:
    """Return how `params.json` says the feed-forward width: as released, if that gives it."""
    for multiplier in (None, 1.2, 1.3, 1.5):
        for multiple_of in (1024, 4096, 256):
            if ffn_dim(config.dim, multiplier, multiple_of) == config.ffn_dim:
                told: dict[str, Any] = {"multiple_of": multiple_of}
                return told if multiplier is None else {**told, "ffn_dim_multiplier": multiplier}
    # Half a unit more than the width: rounding down then gives the width, whatever the division.
    exact = (config.ffn_dim + 0.5) / (8 * config.dim // 3)
    assert ffn_dim(config.dim, exact, 1) == config.ffn_dim, config
    return {"multiple_of": 1, "ffn_dim_multiplier": exact}
