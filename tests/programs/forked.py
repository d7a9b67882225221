"""Ranks of one world as children of a program, each of which leaves what it found in a file."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from orchestrator.protocol.layout import Layout
from trainer import parallel


def found_by(
    program: str,
    folder: Path,
    cut: str,
    size: int,
    ways: Collection[str],
    *,
    replicas: int,
    dies: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Run a program of ranks; return what each of them found, by way.

    Args:
        program: module of tests.programs, whose ranks `conduct` starts.
        folder: where each leaves what it found.
        cut: dimensions in which a replica is cut, split by commas.
        size: ranks of a replica in each.
        ways: what it is to find something about.
        replicas: of the world.
        dies: whether some rank is meant to die, and leaves nothing.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.programs.{program}", str(folder), cut, str(size), *ways],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == int(dies), done.stderr[-3000:]
    files = [folder / f"{rank}.json" for rank in range(replicas * size ** len(cut.split(",")))]
    ranks = [json.loads(file.read_bytes()) for file in files if file.exists() or not dies]
    return {way: [rank[way] for rank in ranks] for way in ways}


def conduct(
    folder: Path, layout: Layout, find: Callable[[parallel.World], Any], device: str = "cpu"
) -> int:
    """Have each rank of a world find something, and write it to a file; return 0 if all did."""
    children = []
    for rank in range(layout.world_size):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.set_num_threads(1)
                world = parallel.World(rank, layout, parallel.device_of(device, rank))
                world.join(FileStore(str(folder / "meeting"), layout.world_size), 60.0)
                (folder / f"{rank}.json").write_text(json.dumps(find(world)))
                world.gather([0.0])  # nobody leaves while others still need it
            except BaseException:  # noqa: BLE001 - the parent hears of it by the exit code
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    return int(any(codes))
