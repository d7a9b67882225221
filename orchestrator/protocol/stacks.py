"""Where a rank stands: the functions that it is in, as they go from an agent to the controller."""

from __future__ import annotations

import msgspec

from orchestrator.protocol.ids import Rank

FRAMES_MAX = 24
"""Of a stack, the innermost. A traceback of a training step has ten to twenty of them."""
FRAME_MAX = 160
"""Characters of a frame; of a longer one the end is kept, which has the file and the line."""


class Stack(msgspec.Struct, frozen=True, array_like=True):
    """Ranks that stand at the same place."""

    ranks: tuple[Rank, ...]
    """Ascending."""
    frames: tuple[str, ...]
    """Of their main thread, "function (file:line)", innermost first."""
