"""Processes that end are told of, by one thread for all of them."""

import subprocess
import sys
import threading
from queue import SimpleQueue

import pytest

from orchestrator.worlds.watching import Watch

WAIT_S = 10.0


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_each_process_that_ends_is_told_of_once_and_those_that_live_are_not() -> None:
    watch, told = Watch(), SimpleQueue[int]()
    processes = [sleeper() for _ in range(3)]
    before = threading.active_count()
    try:
        for process in processes:
            watch.until_end(process.pid, lambda pid=process.pid: told.put(pid))
        assert threading.active_count() == before + 1

        for process in (processes[2], processes[0]):
            process.kill()
            assert told.get(timeout=WAIT_S) == process.pid

        assert told.empty()
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=WAIT_S)


def test_a_process_that_is_gone_already_is_said_to_be() -> None:
    process = sleeper()
    process.kill()
    process.communicate(timeout=WAIT_S)

    with pytest.raises(ProcessLookupError):
        Watch().until_end(process.pid, lambda: None)
