"""Small texts for tests: documents of words, and sources of them in files of each form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from orchestrator.protocol import runfile

WORDS = ("step", "rank", "node", "shard", "beacon", "agent", "world", "run")


def documents(count: int, seed: int = 0) -> list[str]:
    """Return texts of 5 to 60 words."""
    chance = np.random.default_rng(seed)
    return [
        f"{seed}-{at}: " + " ".join(chance.choice(WORDS, int(chance.integers(5, 60))).tolist())
        for at in range(count)
    ]


def jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    """Write a document per line; return the address."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def table(path: Path, texts: list[str], field: str = "text") -> str:
    """Write a document per row; return the address."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({field: texts}), path)
    return str(path)


def mixed(folder: Path, **settings: object) -> runfile.Data:
    """Return two sources of different size, the smaller one with three times the weight."""
    return runfile.Data(
        sources=(
            runfile.DataSource(uri=jsonl(folder / "few.jsonl", documents(6, seed=1)), weight=3),
            runfile.DataSource(
                uri=table(folder / "many.parquet", documents(60, seed=2), "body"), field="body"
            ),
        ),
        **settings,  # type: ignore[arg-type]
    )


class GivenUpError(Exception):
    pass


class Patience:
    """Gives up at the given call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise GivenUpError
