"""The trainer, in processes that give way after as many worlds as a test says.

A tiny model's gradients are exchanged in several buckets, as a large one's are.
"""

import os

from trainer import parallel, reduction, train

warm_up = train.warm_up


def main() -> int:
    parallel.WORLDS_MAX = int(os.environ.get("WORLDS_MAX", parallel.WORLDS_MAX))
    reduction.BUCKET_ELEMENTS = 10_000
    return train.main()
