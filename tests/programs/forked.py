"""Ranks of one world as children of a program, each of which leaves what it found in a file."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from orchestrator.protocol.layout import Layout
from trainer import parallel


def conduct(folder: Path, layout: Layout, find: Callable[[parallel.World], Any]) -> int:
    """Have each rank of a world find something, and write it to a file; return 0 if all did."""
    children = []
    for rank in range(layout.world_size):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.set_num_threads(1)
                world = parallel.World(rank, layout, parallel.device_of("cpu", 0))
                world.join(FileStore(str(folder / "meeting"), layout.world_size), 60.0)
                (folder / f"{rank}.json").write_text(json.dumps(find(world)))
                world.gather([0.0])  # nobody leaves while others still need it
            except BaseException:  # noqa: BLE001 - the parent hears of it by the exit code
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    return int(any(codes))
