"""Two processes that work for this one until they are ended; each leaves its number in a folder."""

import os
import sys
import time
from pathlib import Path

from orchestrator.cli import pool


def work(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


if __name__ == "__main__":
    list(pool.each(work, sys.argv[1:] * 2, jobs=2))
