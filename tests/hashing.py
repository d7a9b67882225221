"""Runs a program with several seeds of Python's hashes: what it prints may not depend on them."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed(program: str, *arguments: str, hash_seeds: Iterable[int] = (0, 1)) -> set[str]:
    """Return what a program prints, once for each way in which it differs."""
    return {
        subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=dict(os.environ, PYTHONHASHSEED=str(seed)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=150,
            check=True,
        ).stdout.strip()
        for seed in hash_seeds
    }
