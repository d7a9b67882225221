"""What the controller has freed is the system's again."""

import resource
from pathlib import Path

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
