"""The trainer, in processes that give way after as many worlds as a test says."""

import os

from trainer import parallel, train

warm_up = train.warm_up


def main() -> int:
    parallel.WORLDS_MAX = int(os.environ.get("WORLDS_MAX", parallel.WORLDS_MAX))
    return train.main()
