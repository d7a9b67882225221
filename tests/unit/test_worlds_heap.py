"""What the controller has freed is the system's again."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.worlds.heap import give_back

PIECE, PIECES, KEPT_OF = 1024, 65_536, 512


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_memory_that_was_freed_between_pieces_that_are_still_used_goes_back() -> None:
    """The allocator itself gives back no more than what lies behind the last piece in use."""
    pieces = [bytes(PIECE) for _ in range(PIECES)]
    kept = pieces[::KEPT_OF] + pieces[-1:]
    del pieces
    before = resident()

    give_back()

    assert before - resident() > PIECES * PIECE // 2
    assert len(kept) == PIECES // KEPT_OF + 1


THREADS = """
import ctypes, sys, threading
from orchestrator.worlds import heap
if sys.argv[1] == "one":
    heap.share_one()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
all_there = threading.Barrier(8)
def work():
    all_there.wait()
    taken = [bytes(1000) for _ in range(100)]
    all_there.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="of glibc alone")
@pytest.mark.parametrize("how", ["one", "as it is"])
def test_threads_of_a_controller_free_into_one_heap(tmp_path: Path, how: str) -> None:
    told = tmp_path / "heaps.xml"

    subprocess.run([sys.executable, "-c", THREADS, how, str(told)], check=True)

    heaps = told.read_text(encoding="ascii").count("<heap nr=")
    assert heaps == 1 if how == "one" else heaps > 1
