"""The trainer, with a source that takes seconds for one sample in the middle of the run."""

import time

from trainer import train
from trainer.data import Batch, Samples

SLOW_STEP, SLOW_S = 12, 4.0
warm_up = train.warm_up
_batch = Samples.batch


def _slow(samples: Samples, step: int, indices: range) -> Batch:
    if step == SLOW_STEP and indices.start == 0:
        time.sleep(SLOW_S)
    return _batch(samples, step, indices)


def main() -> int:
    Samples.batch = _slow  # type: ignore[method-assign]
    return train.main()
