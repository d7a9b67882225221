"""Compares two checkpoints of a store by their digests; no body is read."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cli import units
from orchestrator.cli.choices import Form
from orchestrator.cli.stored import Store, picked, readable
from orchestrator.cli.tables import grid, in_json
from storage.blob import BlobStore
from storage.commit import completed, fetch_index
from storage.manifest import Manifest

SAME, DIFFERS, CUT = "same", "differs", "cut differently"
ROWS_SHOWN = 100

_Box = tuple[tuple[int, ...], tuple[int, ...], str]
"""Offset, shape and item type of a chunk."""
_Tensors = dict[str, dict[_Box, str]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two checkpoints have in common.

    Attributes:
        one: name of the first, STEP@EPOCH.
        other: of the second.
        facts: what is said of the whole, where they differ: by name, both values.
        tensors: by name, `same`, `differs`, `cut differently` (which says nothing of the values),
            or in which of them it is only.
    """

    one: str
    other: str
    facts: dict[str, tuple[str, str]]
    tensors: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether they are the same state, as far as digests can tell.

        The step is none of it: a state can be saved twice.
        """
        return not self.facts and all(state == SAME for state in self.tensors.values())


def compare(store: Store, one: str, other: str) -> Comparison:
    """Compare two checkpoints."""
    first, second = (readable(store, picked(store, name)) for name in (one, other))
    facts = {
        name: (str(left), str(right))
        for name, left, right in (
            ("model", first.model, second.model),
            ("shards", first.shards, second.shards),
            ("layout", first.layout, second.layout),
            ("state digest", first.state_digest, second.state_digest),
        )
        if left != right
    }
    mine, theirs = _tensors(store.blobs, first), _tensors(store.blobs, second)
    names = (f"{first.step}@{first.epoch}", f"{second.step}@{second.epoch}")
    tensors = {
        name: _state(mine.get(name), theirs.get(name), *names)
        for name in sorted(mine.keys() | theirs.keys())
    }
    return Comparison(*names, facts, tensors)


def told(came: Comparison, output: Form) -> str:
    """Return a comparison in the asked form."""
    if output is Form.JSON:
        return in_json(
            {
                "one": came.one,
                "other": came.other,
                "same": came.same,
                "facts": {name: list(both) for name, both in came.facts.items()},
                "tensors": came.tensors,
            }
        )
    counts = {state: list(came.tensors.values()).count(state) for state in came.tensors.values()}
    lines = [f"{came.one} and {came.other}: " + _counted(counts)]
    if came.facts:
        rows = [[name, *both] for name, both in came.facts.items()]
        lines += ["", grid(["WHAT", came.one, came.other], rows)]
    rows = [[name, state] for name, state in came.tensors.items() if state != SAME]
    if rows:
        lines += ["", grid(["TENSOR", "IS"], rows[:ROWS_SHOWN])]
    if len(rows) > ROWS_SHOWN:
        lines.append(f"and {len(rows) - ROWS_SHOWN} more; -o json has them all")
    return units.printable("\n".join(lines))


def _counted(counts: dict[str, int]) -> str:
    parts = [f"{units.count(count, 'tensor')} {state}" for state, count in sorted(counts.items())]
    return ", ".join(parts) or "no tensors"


def _tensors(blobs: BlobStore, manifest: Manifest) -> _Tensors:
    tensors: _Tensors = {}
    manifest = completed(blobs, manifest)
    for shard in range(manifest.shards):
        for chunk in fetch_index(blobs, manifest, shard).chunks:
            box = (chunk.offset, chunk.shape, chunk.dtype)
            tensors.setdefault(chunk.name, {})[box] = chunk.xxh3_128
    return tensors


def _state(mine: dict[_Box, str] | None, theirs: dict[_Box, str] | None, *names: str) -> str:
    if mine is None or theirs is None:
        return f"only in {names[mine is None]}"
    if mine == theirs:
        return SAME
    return DIFFERS if mine.keys() == theirs.keys() else CUT
