"""Which states a generation continues: its ancestors, and how far each of them counts.

A generation that is left behind may have staged the same steps as one that is continued, and a
node that was away still holds them. So a state is named by step and generation, never by step
alone: what is restored together must have been trained together.
"""

from __future__ import annotations

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import Ancestor

ANCESTORS_MAX = 64
"""Of older ones nothing has been kept for long; it would only make each order longer."""


def continued(
    ancestors: tuple[Ancestor, ...],
    generation: Generation,
    step: Step | None,
    epoch: Generation | None,
) -> tuple[Ancestor, ...]:
    """Return the ancestors of the generation that comes after `generation`, oldest first.

    Args:
        ancestors: those of `generation`.
        generation: the newest one so far, 0 if this is the first.
        step: where the next one continues; None for the seed, which has no ancestor.
        epoch: the generation whose checkpoint it restores; None if its state lies in memory,
            which has the states of `generation` and its ancestors only.
    """
    if step is None:
        return ()
    if epoch is not None:
        return (Ancestor(epoch, step),)
    line: list[Ancestor] = []
    for one in (*ancestors, Ancestor(generation, step)):
        last = min(one.last, step)
        # One that continued at the last step that counts has added nothing.
        if not line or last > line[-1].last:
            line.append(Ancestor(one.generation, last))
    return tuple(line[-ANCESTORS_MAX:])
