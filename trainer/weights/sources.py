"""Finds out what kind of weights a folder holds, and opens them: nothing but tables is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from orchestrator.protocol.sizes import misfits
from orchestrator.worker import MisconfiguredError
from trainer.config import PRESETS, ModelConfig, RopeScaling
from trainer.weights import names, run, safetensors, tensorzip
from trainer.weights.files import HINT, Folder
from trainer.weights.spans import Span
from trainer.weights.stored import Box, Stored, Weights, describe

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_PLAIN = re.compile(r"[^/\\\0]+\.safetensors")
_PICKLES = (".bin", ".pt", ".pkl", ".ckpt")


def open_weights(address: str) -> Weights:
    """Open weights: a folder of Hugging Face's or Meta's layout, or of a run of holdfast.

    Args:
        address: path; for the first two an fsspec address works as well.

    Raises:
        MisconfiguredError: if there are none, or they are not whole, not of a Llama 3, or not of
            the sizes that they say themselves.
    """
    if (found := run.find(address)) is not None:
        return run.open_run(found)
    folder = Folder(address)
    if "config.json" in folder.sizes:
        return _open_hugging_face(folder)
    if "params.json" in folder.sizes:
        return _open_meta(folder)
    raise MisconfiguredError(f"no weights of a known layout there: {address}", hint=HINT)


# Hugging Face ---------------------------------------------------------------------------------


class _Rope(msgspec.Struct, frozen=True):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Config(msgspec.Struct, frozen=True):
    """What we need of `config.json`, and what we must not overlook."""

    model_type: str
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    vocab_size: _Size
    rms_norm_eps: float
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    quantization_config: Any = None


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def _open_hugging_face(folder: Folder) -> Weights:
    where = folder.where("config.json")
    read = folder.json("config.json", _Config)
    config = _hugging_face_config(read, where)
    files, placed = _hugging_face_files(folder)
    tables = {file: safetensors.read_table(folder, file) for file in files}
    for name, file in placed.items():
        if name not in tables[file]:
            raise MisconfiguredError(
                f"{name} is not there, the index says it is: {folder.where(file)}",
                hint="index and files are not of one release: copy them again",
            )
    spans = {
        name: span
        for file, table in tables.items()
        for name, span in table.items()
        if placed.get(name, file) == file
    }
    pieces = {name: [span] for name, span in spans.items()}
    stored = _named(config, names.HUGGING_FACE, pieces, folder, tied=read.tie_word_embeddings)
    return Weights(
        config,
        stored,
        layout="Hugging Face, safetensors",
        where=folder.address,
        digest=folder.sample(["config.json", *tables]),
        tied=read.tie_word_embeddings,
    )


def _hugging_face_files(folder: Folder) -> tuple[list[str], dict[str, str]]:
    """Return the files, and the file of each name if there is an index."""
    index = "model.safetensors.index.json"
    if index in folder.sizes:
        files = folder.json(index, _Index).weight_map
        for name, file in files.items():
            if not _PLAIN.fullmatch(file):
                raise MisconfiguredError(
                    f"file of {name} is {file!r}, expected a *.safetensors in the same folder: "
                    f"{folder.where(index)}",
                    hint="an index names nothing outside of its folder",
                )
        return sorted(set(files.values())), files
    if "model.safetensors" in folder.sizes:
        return ["model.safetensors"], {}
    if pickled := [name for name in folder.sizes if name.endswith(_PICKLES)]:
        raise MisconfiguredError(
            f"pickled weights are not loaded: {folder.where(min(pickled))}",
            hint="take the release in safetensors: a pickle is a program, and may do anything",
        )
    raise MisconfiguredError(f"no model.safetensors and no {index}: {folder.address}", hint=HINT)


def _hugging_face_config(read: _Config, where: str) -> ModelConfig:
    heads = read.num_attention_heads
    odd = {
        "model_type": (read.model_type, "llama"),
        "hidden_act": (read.hidden_act, "silu"),
        "attention_bias": (read.attention_bias, False),
        "mlp_bias": (read.mlp_bias, False),
        "head_dim": (read.head_dim or read.hidden_size // heads, read.hidden_size // heads),
        "quantization_config": (read.quantization_config is not None, False),
    }
    for field, (found, expected) in odd.items():
        if found != expected:
            raise MisconfiguredError(
                f"{field} is {found!r}, expected {expected!r}: {where}",
                hint="only models of the Llama 3 family are loaded, and not quantised",
            )
    rope = read.rope_parameters or _Rope()
    return _checked(
        ModelConfig(
            dim=read.hidden_size,
            layers=read.num_hidden_layers,
            heads=heads,
            kv_heads=read.num_key_value_heads or heads,
            ffn_dim=read.intermediate_size,
            vocab=read.vocab_size,
            rope_theta=rope.rope_theta or read.rope_theta or 10_000.0,
            norm_eps=read.rms_norm_eps,
            rope_scaling=_hugging_face_scaling(read.rope_scaling or rope, where),
        ),
        where,
    )


def _hugging_face_scaling(rope: _Rope, where: str) -> RopeScaling | None:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    numbers = (
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        rope.original_max_position_embeddings,
    )
    if kind != "llama3" or None in numbers:
        raise MisconfiguredError(
            f"rope type is {kind!r} with {numbers}, expected `default`, or `llama3` with factor, "
            f"low_freq_factor, high_freq_factor, original_max_position_embeddings: {where}",
            hint="only models of the Llama 3 family are loaded",
        )
    return msgspec.convert(
        dict(zip(RopeScaling.__struct_encode_fields__, numbers, strict=True)), RopeScaling
    )


# Meta -----------------------------------------------------------------------------------------


class _Params(msgspec.Struct, frozen=True):
    """What we need of `params.json`."""

    dim: _Size
    n_layers: _Size
    n_heads: _Size
    vocab_size: Annotated[int, msgspec.Meta(ge=-1, le=1 << 32)]
    multiple_of: _Size = 256
    norm_eps: float = 1e-5
    n_kv_heads: _Size | None = None
    ffn_dim_multiplier: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    rope_theta: float = 10_000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None


def ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Return the feed-forward width that `params.json` stands for.

    Source: the reference model's FeedForward.

    >>> [ffn_dim(4096, 1.3, 1024), ffn_dim(8192, 1.3, 4096), ffn_dim(16_384, 1.2, 4096)]
    [14336, 28672, 53248]
    """
    width = 8 * dim // 3
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def _open_meta(folder: Folder) -> Weights:
    where = folder.where("params.json")
    config = _meta_config(folder.json("params.json", _Params), where)
    files = sorted(name for name in folder.sizes if _PART.fullmatch(name))
    expected = [f"consolidated.{n:02d}.pth" for n in range(len(files))]
    if not files or files != expected:
        missing = sorted({*expected, "consolidated.00.pth"} - {*files})
        raise MisconfiguredError(
            f"{missing[0]} is not there: {folder.address}",
            hint="all parts of a release are needed: consolidated.00.pth and up",
        )
    tables = [tensorzip.read_table(folder, file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if odd := sorted(table.keys() ^ tables[0].keys()):
            raise MisconfiguredError(
                f"{odd[0]} is not in every part: {folder.where(file)}, {folder.where(files[0])}",
                hint="the parts are not of one release: copy them again",
            )
    pieces = {name: [table[name] for table in tables] for name in tables[0]}
    return Weights(
        config,
        _named(config, names.META, pieces, folder, tied=False),
        layout=f"Meta, {len(files)} part{'s' * (len(files) > 1)}",
        where=folder.address,
        digest=folder.sample(["params.json", *files]),
    )


def _meta_config(read: _Params, where: str) -> ModelConfig:
    scaling = None
    if read.use_scaled_rope:
        if read.rope_scaling_factor is None and read.dim < PRESETS["8B"].dim:
            raise MisconfiguredError(
                f"use_scaled_rope without rope_scaling_factor, of dim {read.dim}: {where}",
                hint='Llama 3.2 is not stretched as 3.1: add "rope_scaling_factor": 32 for 1B and '
                "3B, or take Hugging Face's layout",
            )
        known = RopeScaling()
        scaling = RopeScaling(
            factor=read.rope_scaling_factor or known.factor,
            high_freq_factor=read.rope_high_freq_factor or known.high_freq_factor,
        )
    return _checked(
        ModelConfig(
            dim=read.dim,
            layers=read.n_layers,
            heads=read.n_heads,
            kv_heads=read.n_kv_heads or read.n_heads,
            ffn_dim=ffn_dim(read.dim, read.ffn_dim_multiplier, read.multiple_of),
            vocab=read.vocab_size,
            rope_theta=read.rope_theta,
            norm_eps=read.norm_eps,
            rope_scaling=scaling,
        ),
        where,
    )


# Both -----------------------------------------------------------------------------------------


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    for message, hint in misfits(config):
        raise MisconfiguredError(f"{message}: {where}", hint=hint)
    return config


def _named(
    config: ModelConfig,
    naming: names.Naming,
    pieces: Mapping[str, list[Span]],
    folder: Folder,
    *,
    tied: bool,
) -> dict[str, Stored]:
    """Return all weights by our names, each of the shape that it should have."""
    hint = f"the folder says that it has a model of {describe(config)}"
    left = dict(pieces)
    stored: dict[str, Stored] = {}
    for name, shape in names.shapes(config):
        theirs = naming.theirs(name)
        if tied and name == names.HEAD:
            left.pop(theirs, None)
            stored[name] = stored[names.EMBEDDING]
            continue
        found = left.pop(theirs, None)
        if found is None:
            raise MisconfiguredError(f"{theirs} is not there: {folder.address}", hint=hint)
        boxes = _joined(found, shape)
        if boxes is None:
            shapes = " + ".join(str(list(span.shape)) for span in found)
            raise MisconfiguredError(
                f"{theirs} is of shape {shapes}, expected {list(shape)}: {folder.address}",
                hint=hint,
            )
        if len({span.dtype for span in found}) > 1:
            raise MisconfiguredError(
                f"{theirs} is of another type in each part: {folder.address}", hint=hint
            )
        turned = config.head_dim if naming.halves and names.is_rotated(name) else 0
        stored[name] = Stored(shape=shape, boxes=boxes, turned_rows=turned, called=theirs)
    if extra := sorted(name for name in left if not name.endswith(naming.ignored)):
        raise MisconfiguredError(
            f"{extra[0]} is no weight of such a model ({len(extra)} like it): {folder.address}",
            hint=hint,
        )
    return stored


def _joined(spans: Iterable[Span], shape: names.Shape) -> tuple[Box, ...] | None:
    """Return the parts of a weight side by side as its shape asks for; None if they do not fit."""
    parts = list(spans)
    if all(part.shape == shape for part in parts):
        return (Box((0,) * len(shape), parts[0]),)
    for dim in range(len(shape)):
        boxes, at = [], 0
        for part in parts:
            boxes.append(Box((*(0,) * dim, at, *(0,) * (len(shape) - dim - 1)), part))
            at += part.shape[dim] if dim < len(part.shape) else 0
        rest = (*shape[:dim], *shape[dim + 1 :])
        if at == shape[dim] and all((*p.shape[:dim], *p.shape[dim + 1 :]) == rest for p in parts):
            return tuple(boxes)
    return None
