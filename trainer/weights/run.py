"""Opens the weights of a run of holdfast: of its newest checkpoint on the durable tier."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from orchestrator.protocol.pinned import ROOT_DIGITS, parts
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worker import MisconfiguredError
from storage.address import open_store
from storage.blob import BlobStore
from storage.catalog import Catalog, CommitRecord
from storage.commit import completed, fetch_index
from storage.digest import chunk_digest
from storage.errors import StorageError
from storage.manifest import Manifest, body_key, describe
from storage.shard import StagedChunk
from trainer.config import model_config
from trainer.weights import names
from trainer.weights.names import Shape
from trainer.weights.spans import DAMAGED
from trainer.weights.stored import DTYPES, Box, Stored, Weights

RUN_FILE = "run.json"
"""In the folder of a run: `TrainingRun` as JSON."""
CHECKPOINTS = "checkpoints"
"""There too: the durable tier, unless the run file names another one."""
STATE = "param"
"""Of what a checkpoint has for each weight, the weight itself."""
_FAULTS_MAX = 3
"""So many are told of; where the format is another one, all records have the same."""


class RunAt(NamedTuple):
    """The folder of a run, and which of its checkpoints is meant."""

    folder: Path
    step: int | None
    """None for the newest."""
    root: str = ""
    """What the root of its manifest begins with; "" for any."""


def find(address: str) -> RunAt | None:
    """Return the run that an address means, or None if it means something else.

    Args:
        address: the folder of a run, or the one in it with checkpoints; with `@STEP` behind it a
            checkpoint of that step, and with `@STEP-ROOT` that very one.
    """
    path, step, root = parts(address)
    if "://" in path or "\0" in path:
        return None
    folder = Path(path)
    if folder.name == CHECKPOINTS and not (folder / RUN_FILE).is_file():
        folder = folder.parent
    return RunAt(folder, step, root) if (folder / RUN_FILE).is_file() else None


def read(at: RunAt) -> TrainingRun:
    """Return the run. Raises MisconfiguredError if what is there is no run file."""
    try:
        return msgspec.json.decode((at.folder / RUN_FILE).read_bytes(), type=TrainingRun)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MisconfiguredError(
            f"no run file as holdfast leaves it: {error}: {at.folder / RUN_FILE}",
            hint="name the folder of a run: `holdfast get runs -o wide` has them",
        ) from error


def pin(address: str) -> str:
    """Return an address that will mean the same checkpoint, or no other.

    Weights that are not of a run have no other address than their own.

    Raises:
        MisconfiguredError: as `open_run`.
    """
    if (at := find(address)) is None:
        return address
    with _told(str(at.folder)):
        manifest = _manifest(_store(read(at), at), at)
    return f"{parts(address).folder}@{manifest.step}-{manifest.root[:ROOT_DIGITS]}"


def open_run(at: RunAt) -> Weights:
    """Open the weights of a checkpoint of a run.

    Raises:
        MisconfiguredError: if the run has no such checkpoint, or it is damaged.
    """
    _, _, states = open_states(at, (STATE,))
    return states[STATE]


def open_states(
    at: RunAt, states: Sequence[str]
) -> tuple[Manifest, dict[str, object], dict[str, Weights]]:
    """Open what a checkpoint of a run has for each weight.

    Args:
        at: which.
        states: what to open: the weight itself, or what the optimizer remembers of it.

    Returns:
        Its manifest, what its shards say beside their chunks, and of each state all weights.

    Raises:
        MisconfiguredError: as `open_run`.
    """
    run = read(at)
    config = model_config(run.spec.trainer.model)
    # Ranks of tensor parallelism have some weights in common, each in its own shard.
    boxes: dict[tuple[str, str], dict[tuple[Shape, Shape], Box]] = {}
    extra: dict[str, object] = {}
    with _told(str(at.folder)):
        store = _store(run, at)
        manifest = _manifest(store, at)
        if not manifest.model.startswith(config.fingerprint):
            raise MisconfiguredError(
                f"model is {manifest.model}, the run file has {config.fingerprint}: "
                f"{describe(manifest)}: {at.folder}",
                hint="the checkpoint is of a run with other sizes",
            )
        whole = completed(store, manifest)
        for shard in range(manifest.shards):
            index = fetch_index(store, whole, shard)
            extra = dict(index.extra)
            key = body_key(manifest.step, manifest.epoch, shard)
            for chunk in index.chunks:
                if chunk.state in states and 0 not in chunk.shape:
                    known = boxes.setdefault((chunk.state, chunk.fqn), {})
                    known.setdefault((chunk.offset, chunk.shape), _box(store, key, chunk))
    return (
        manifest,
        extra,
        {
            state: Weights(
                config,
                {
                    name: _stored(
                        name, shape, tuple(boxes.get((state, name), {}).values()), manifest
                    )
                    for name, shape in names.shapes(config)
                },
                layout=f"holdfast, {describe(manifest)}",
                where=str(at.folder),
                digest=manifest.root,
            )
            for state in states
        },
    )


def annealed(address: str) -> list[str]:
    """Return the addresses of a run's checkpoints within its anneal, the oldest first.

    Raises:
        MisconfiguredError: if it is no run, had no anneal, or has no checkpoints in it.
    """
    hint = "name checkpoints one by one: RUN@STEP RUN@STEP ..."
    if (at := find(address)) is None or at.step is not None:
        raise MisconfiguredError(f"no run to find the checkpoints of: {address}", hint=hint)
    run = read(at)
    trainer = run.spec.trainer
    if not trainer.anneal_steps:
        raise MisconfiguredError(f"spec.trainer.annealSteps is 0: {at.folder}", hint=hint)
    with _told(str(at.folder)):
        found = _standing(_store(run, at))
    begins = trainer.steps - trainer.anneal_steps
    annealing = [record for record in found if record.step > begins]
    if any(record.manifest is None for record in annealing):
        raise MisconfiguredError(f"{_faults(annealing)}: {at.folder}", hint=hint)
    steps = sorted({record.step for record in annealing})
    if not steps:
        raise MisconfiguredError(
            f"no checkpoint after step {begins}, at which the anneal begins: {at.folder}",
            hint="spec.checkpoint.keepLast says how many there are in the end",
        )
    return [f"{at.folder}@{step}" for step in steps]


def _store(run: TrainingRun, at: RunAt) -> BlobStore:
    return open_store(run.spec.checkpoint.uri or str(at.folder / CHECKPOINTS))


def _standing(store: BlobStore) -> list[CommitRecord]:
    """Return what was committed and is neither superseded nor barred, the newest first."""
    catalog = Catalog(store)
    barred = catalog.barred()
    return [
        record
        for record in catalog.commits()
        if not record.superseded and (record.step, record.epoch) not in barred
    ]


def _manifest(store: BlobStore, at: RunAt) -> Manifest:
    """Return that of the checkpoint that is meant.

    A newest one that can not be read is not passed over for an older one: whoever names no step
    would not hear that steps are missing.
    """
    standing = _standing(store)
    meant = [record for record in standing if at.step in {None, record.step}]
    steps = sorted({record.step for record in standing if record.manifest is not None})
    others = (
        f"there are those of steps {', '.join(map(str, steps))}: {at.folder}@{steps[-1]}"
        if steps
        else "there is none that can be read: see `holdfast get checkpoints`"
    )
    if not meant:
        wanted = "checkpoint" if at.step is None else f"checkpoint of step {at.step}"
        none = "the run has not committed one yet: see `holdfast get checkpoints`"
        raise MisconfiguredError(f"no {wanted}: {at.folder}", hint=others if standing else none)
    manifest = meant[0].manifest
    if manifest is None:
        raise MisconfiguredError(f"{_faults(meant)}: {at.folder}", hint=others)
    if not manifest.root.startswith(at.root):
        raise MisconfiguredError(
            f"root of the checkpoint of step {at.step} is {manifest.root[:ROOT_DIGITS]}, expected "
            f"{at.root}: {at.folder}",
            hint="its run took that step again; begin a new run from what is there now",
        )
    return manifest


def _faults(records: Sequence[CommitRecord]) -> str:
    """Return what is wrong with those that can not be read, in words."""
    faulty = [record for record in records if record.manifest is None]
    told = "; ".join(
        f"checkpoint of step {record.step} can not be read: {record.fault}"
        for record in faulty[:_FAULTS_MAX]
    )
    more = len(faulty) - _FAULTS_MAX
    return f"{told}; and {more} more" if more > 0 else told


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A rank's part of a weight, in the shard that it wrote."""

    store: BlobStore
    key: str
    chunk: StagedChunk

    @property
    def shape(self) -> Shape:
        """Its own."""
        return self.chunk.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of its items."""
        return DTYPES[self.chunk.dtype]

    def rows(self, first: int, count: int) -> Tensor:
        """Read these rows, after verifying all of them.

        Raises:
            MisconfiguredError: if they are not what was staged.
        """
        chunk = self.chunk
        with _told(self.key):
            content = bytearray(self.store.get(self.key, chunk.start, chunk.size))
        if chunk_digest(content) != chunk.xxh3_128:
            raise MisconfiguredError(
                f"xxh3-128 is {chunk_digest(content)}, index says {chunk.xxh3_128}: "
                f"{chunk.name}: {self.key}",
                hint=DAMAGED,
            )
        tensor = torch.frombuffer(content, dtype=self.dtype).reshape(chunk.shape)
        return tensor[first : first + count]


def _box(store: BlobStore, key: str, chunk: StagedChunk) -> Box:
    if chunk.dtype not in DTYPES:
        raise MisconfiguredError(
            f"dtype is {chunk.dtype}, expected one of {', '.join(DTYPES)}: {chunk.name}: {key}",
            hint="the checkpoint is not of the embedded trainer",
        )
    return Box(chunk.offset, Chunk(store=store, key=key, chunk=chunk))


def _stored(name: str, shape: Shape, boxes: tuple[Box, ...], manifest: Manifest) -> Stored:
    items = sum(math.prod(box.piece.shape) for box in boxes)
    if items != math.prod(shape):
        raise MisconfiguredError(
            f"{name} has {items} values, expected {list(shape)}: {describe(manifest)}",
            hint="the checkpoint is not of the embedded trainer, or of a newer one",
        )
    return Stored(shape=shape, boxes=boxes, called=name)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise MisconfiguredError(f"{error}: {where}", hint=error.hint) from error
