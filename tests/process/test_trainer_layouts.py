"""Ranks that cut a model in three dimensions train what one rank would."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from orchestrator.protocol.layout import Layout
from storage.digest import combine, partial_digest
from tests.programs.layouts import CURSOR, STEPS
from trainer.optim import STATES
from trainer.stamp import Stamp

pytestmark = pytest.mark.process
ALONE: dict[str, Any] = {}
FIXED: dict[str, Any] = {"reduction": "deterministic"}
AGAIN: dict[str, Any] = {"activation_checkpointing": "full"}
LARGE: dict[str, Any] = {"micro_batch": 4}
"""Ranks that cut tensors take most of the time, and a micro-batch costs them the same whatever its
size. It differs from that of the one rank, which must come to the same."""
LAYOUTS: list[dict[str, Any]] = [
    ALONE,
    {**LARGE, "dp_shard": 2, "tp": 2},
    {"pp": 2, "dp_shard": 2, "micro_batch": 1},
    {**LARGE, "pp": 2, "tp": 2, "pipeline_schedule": "interleaved"},
    {"pp": 2, "dp_shard": 2, "tp": 2},
    {**LARGE, "pp": 2, "cp": 2, "tp": 2, "positions": "document"},
    {"dp_shard": 2, "cp": 2},
    {**LARGE, "pp": 2, "tp": 2, "pipeline_schedule": "interleaved", **AGAIN},
    {**LARGE, **FIXED, "tp": 2},
    {**LARGE, **FIXED, "dp_replicate": 2, "tp": 2},
    {**FIXED, "cp": 2, "positions": "document"},
    {**FIXED, "dp_replicate": 3, "cp": 2, "positions": "document"},
    {**FIXED, "pp": 2, "dp_shard": 2, "micro_batch": 1},
    {**FIXED, "pp": 2, "dp_shard": 2, "micro_batch": 1, "dp_replicate": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_replicate": 2, "dp_shard": 2, "plain": True},
    {"dp_replicate": 2, "pp": 2},
    {"dp_replicate": 2, "cp": 2},
    {**LARGE, "dp_replicate": 2, "tp": 2},
    {"pp": 2, "cp": 2},
    {**LARGE, "cp": 2, "tp": 2},
]
TWINS = [(3, 7), (8, 9), (10, 11), (12, 13), (14, 15)]
"""Layouts of which the second has to come to the bits of the first."""


class Came:
    """What the ranks of a world came to."""

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self.layout = layout
        self.ranks = [np.load(folder / f"{number}-{r}.npz") for r in range(layout.world_size)]
        self.steps = self.ranks[0]["steps"]

    def weights(self) -> dict[str, np.ndarray]:
        """Put the weights together from the parts of the first replica."""
        parts: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
        for rank in self.layout.ranks_of(replica=0):
            for key in self.ranks[rank].files:
                name, at, offset = key.partition("@")
                if at:
                    place = tuple(map(int, offset.split(",")))
                    parts.setdefault(name, []).append((place, self.ranks[rank][key]))
        return {name: _whole(pieces) for name, pieces in parts.items()}

    def lanes(self) -> tuple[int, int]:
        return combine([tuple(map(int, rank["lanes"])) for rank in self.ranks])


def _whole(pieces: list[tuple[tuple[int, ...], np.ndarray]]) -> np.ndarray:
    ends = [np.add(place, piece.shape) for place, piece in pieces]
    whole = np.full(np.max(ends, axis=0), np.nan, np.float32)
    for place, piece in pieces:
        spot = tuple(slice(a, a + n) for a, n in zip(place, piece.shape, strict=True))
        known = whole[spot]
        # Whoever holds the same has the same bits.
        assert np.isnan(known).all() or np.array_equal(known, piece)
        whole[spot] = piece
    assert not np.isnan(whole).any()
    return whole


def came(folder: Path) -> list[Came]:
    command = [sys.executable, "-W", "error", "-m", "tests.programs.layouts", str(folder)]
    texts = [json.dumps(layout) for layout in LAYOUTS]
    done = subprocess.run(
        [*command, *texts], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        Came(folder, n, Layout(**{k: v for k, v in each.items() if k in Layout._fields}))
        for n, each in enumerate(LAYOUTS)
    ]


def test_every_two_dimensions_and_the_three_of_llama_3_are_combined() -> None:
    combined = [{name for name in Layout._fields if each.get(name, 1) > 1} for each in LAYOUTS]

    for pair in itertools.combinations(Layout._fields, 2):
        assert {*pair} in combined, pair
    assert {"dp_shard", "pp", "tp"} in combined


def test_every_layout_trains_what_one_rank_does_and_has_the_digest_of_its_state(
    tmp_path: Path,
) -> None:
    """One test, so that workers of a parallel run do not all train everything."""
    all_came = came(tmp_path)
    alone, *others = all_came

    assert_digest_of_the_whole(alone)
    for cut in others:
        assert_same(cut, alone)
        assert_digest_of_the_whole(cut)
    for first, second in TWINS:
        one, other = all_came[first], all_came[second]
        # More replicas with deterministic reduction, activations that are computed again, or two
        # ranks that tell each other weights and gradients in torch's own way.
        assert one.lanes() == other.lanes(), LAYOUTS[second]
        assert np.array_equal(one.steps, other.steps), LAYOUTS[second]


def assert_same(cut: Came, alone: Came) -> None:
    expected, found = alone.weights(), cut.weights()
    assert cut.steps.shape == (STEPS, 2)
    np.testing.assert_allclose(cut.steps, alone.steps, rtol=2e-6, err_msg=str(cut.layout))
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        # Adam divides by the root of tiny squares, so moments are compared more closely.
        close = 1e-4 if name.startswith("param") else 1e-6
        message = f"{name} of {cut.layout}"
        np.testing.assert_allclose(found[name], whole, rtol=1e-3, atol=close, err_msg=message)
    for rank in cut.ranks:
        assert np.array_equal(rank["steps"], cut.steps), "ranks report, and clip by, other bits"
        np.testing.assert_allclose(rank["evaluated"], alone.ranks[0]["evaluated"], rtol=2e-6)


def assert_digest_of_the_whole(came: Came) -> None:
    whole = came.weights()
    cursor = Stamp("run", "", 1, CURSOR).cursor(STEPS)
    text = np.frombuffer(msgspec.json.encode(cursor, order="deterministic"), np.uint8)
    parts = [partial_digest(name, weight) for name, weight in whole.items()]
    assert {name.partition("/")[0] for name in whole} == set(STATES)
    assert came.lanes() == combine([*parts, partial_digest("cursor", text)])
