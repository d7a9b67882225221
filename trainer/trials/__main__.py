"""`python -m trainer.trials SETUP.json FD...`: the ranks of a campaign's world, forked from here.

Each has one socket, by which it hears from the conductor; when that is closed, it ends.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from orchestrator.protocol.trials import Setup
from trainer import train
from trainer.data import open_data
from trainer.job import read_job
from trainer.trials.rank import serve


def main(arguments: Sequence[str]) -> int:
    """Fork the ranks, and wait for them; return 1 if one of them did not end well."""
    setup = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Setup)
    sockets = [socket.socket(fileno=int(number)) for number in arguments[1:]]
    # Once, before there are several who would: no tensor is touched here, and no thread started.
    train.warm_up()
    job = read_job(setup.job, setup.world_size)
    open_data(job.trainer.data, job.tokenizer, setup.cache_dir, lambda: None)
    children = [_fork(setup, rank, sockets) for rank in range(setup.world_size)]
    for each in sockets:
        each.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(codes))


def _fork(setup: Setup, rank: int, sockets: Sequence[socket.socket]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        faulthandler.enable()
        # The conductor sees to it that an interrupt ends everything in order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for other, each in enumerate(sockets):
            if other != rank:
                each.close()
        serve(setup, rank, sockets[rank])
        code = 0
    except Exception:  # noqa: BLE001 - a rank is told of, and ends, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Threads of collectives may be stuck, and nothing of this process is worth keeping.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
