"""Folders of benchmarks, which are gone afterwards also if the benchmark is told to end."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn


@contextmanager
def new_folder(of: Path | None = None) -> Iterator[str]:
    """Make a folder in `of`, by default where temporary files are; it is gone afterwards."""
    with (
        tidied_when_told_to_end(),
        tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=of) as folder,
    ):
        yield folder


@contextmanager
def tidied_when_told_to_end() -> Iterator[None]:
    """Have SIGTERM leave by way of all that tidies up; by itself it ends a process on the spot."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    # Once: what is tidied up then is not to be broken off by the second of two.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
