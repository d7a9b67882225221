"""What detectors cost: the same steps with and without them, in turn, in one world."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from orchestrator.campaign.world import LiveWorld
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.trials import Quiet, Return, Train

WARM_STEPS = 64
"""In which looks that cost more than their share come to be as rare as they stay."""
STRETCH_STEPS = 50
"""In which every detector that does not look at each step has been at work: replays come once."""


def cost(run: TrainingRun, folder: Path, pairs: int) -> Iterator[tuple[float, float]]:
    """Yield seconds of as many steps with detectors and without, again and again.

    Which goes first changes from pair to pair: whatever else a machine does, it does to both.

    Args:
        run: what is trained, with detectors as they are by default.
        folder: of what is needed on the way.
        pairs: how many.
    """
    cache = folder / "tokens"
    cache.mkdir(parents=True)
    with LiveWorld(run, folder / "world", cache) as world:
        world.order(Train(steps=WARM_STEPS, snapshot=0))
        world.order(Return(snapshot=0, generation=world.next_generation()))
        for number in range(pairs):
            took: dict[bool, float] = {}
            for detectors in (number % 2 == 0, number % 2 == 1):
                said = world.order(Quiet(steps=STRETCH_STEPS, detectors=detectors))
                # A world is as slow as its slowest rank.
                took[detectors] = max(math.fsum(each.seconds) for each in said)
                world.listen(float(number))
            yield took[True], took[False]
