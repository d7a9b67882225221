"""Two processes that work for this one until they are ended; each leaves its number in a folder."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.cli import pool


class Slowly(list[str]):
    """One thing at a time: whoever watches the processes is waiting again when the next begins."""

    def __iter__(self) -> Iterator[str]:
        for each in super().__iter__():
            yield each
            time.sleep(0.2)


def work(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


if __name__ == "__main__":
    list(pool.each(work, Slowly(sys.argv[1:] * 2), jobs=2))
