"""What the data costs a step, with a thread that reads ahead and without.

    python -m tests.bench.data [--steps 40]

Prints the time between the announcements of `data` and of `forward`, and that of whole steps, in
milliseconds, in a world of one rank on the CPU; and how fast a text is tokenised.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from orchestrator.protocol import runfile
from orchestrator.worker import RankPhase
from tests import texts
from tests.bench import ending
from trainer import parallel
from trainer.config import ModelConfig
from trainer.data import Samples, open_data
from trainer.prefetch import Prefetch
from trainer.reporter import Unheard
from trainer.shares import Place, share_of
from trainer.step import Training
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens

CONFIG = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, vocab=1280)
DOCUMENTS = 20_000
ALONE = Place(0, 1, 0, 1)


class Watch(Unheard):
    """Adds up the milliseconds of each step that are spent in the phase `data`."""

    def __init__(self) -> None:
        self.data_ms: list[float] = []
        self.step_ms: list[float] = []
        self._since: float | None = None
        self._now_s = 0.0

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        del micro_batch
        now = time.perf_counter()
        if self._since is not None:
            self._now_s += now - self._since
        self._since = now if phase is RankPhase.DATA else None

    def step_done(self, step: int, *, seconds: float, **_: object) -> None:
        del step
        self.data_ms.append(self._now_s * 1000)
        self.step_ms.append(seconds * 1000)
        self._now_s = 0.0


def measure(sources: list[Tokens], job: runfile.Trainer, depth: int) -> tuple[Watch, Watch]:
    """Take steps in turn without and with a thread that reads ahead."""
    samples, steps = Samples(sources, job), range(1, job.steps + 1)
    slices = [(step, indices) for step in steps for indices in share_of(job, ALONE).micro_batches]
    watches = (Watch(), Watch())
    with parallel.alone() as world, Prefetch(samples, slices, depth, nothing, 60.0) as ahead:
        trainings = [Training(job, CONFIG, each, world) for each in (samples, ahead)]
        for step in steps:
            for training, watch in zip(trainings, watches, strict=True):
                training.step(step, watch)
    return watches


def nothing() -> None:
    """Wait in silence."""


def median(values: list[float]) -> str:
    return f"{statistics.median(values[3:]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with ending.new_folder() as folder:
        few, many = (texts.documents(count, seed=count) for count in (DOCUMENTS // 10, DOCUMENTS))
        data = runfile.Data(
            sources=(
                runfile.DataSource(uri=texts.jsonl(Path(folder) / "few.jsonl", few), weight=1),
                runfile.DataSource(uri=texts.table(Path(folder) / "many.parquet", many), weight=3),
            )
        )
        begun = time.perf_counter()
        sources = open_data(data, open_tokenizer(None, 1280), f"{folder}/cache", lambda: None)
        took = time.perf_counter() - begun
        ids = sum(len(source.ids) for source in sources)
        print(f"tokenised {ids} tokens of {len(few) + len(many)} documents in {took:.2f} s")
        print("samples x length, micro-batch: data phase, step; the same with 2 read ahead (ms)")
        for batch, length, micro in ((8, 128, 8), (32, 128, 4), (8, 1024, 2)):
            job = runfile.Trainer(
                steps=steps, seq_len=length, global_batch=batch, micro_batch=micro, data=data
            )
            told = [(median(w.data_ms), median(w.step_ms)) for w in measure(sources, job, 2)]
            print(f"{batch} x {length}, {micro}: {'; '.join(', '.join(each) for each in told)}")


if __name__ == "__main__":
    main()
