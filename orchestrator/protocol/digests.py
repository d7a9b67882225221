"""What ranks say of the bits of their state, so that copies of it can be compared.

A digest is a number of 64 bits that depends on every bit of what it is taken of. Ranks that hold
the same shard have the same digests, or one of them holds something else.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from orchestrator.protocol.ids import Rank, Step

Kind = Literal["weights", "exp_avg", "exp_avg_sq", "gradient", "tokens", "micro-batch", "replay"]
"""Of what: the parts of the training state as an optimizer step finds them; the gradient that it
is given, summed over all ranks; the tokens of this rank's samples; the gradient of its last
micro-batch before anything was added to it, and that of another rank's, computed once more."""
KINDS: tuple[Kind, ...] = get_args(Kind)
SHARED: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq", "gradient")
"""Of what is the same in all replicas; the others differ from rank to rank."""
HEX_DIGITS = 16
NONE = 0
"""Not taken. A digest that happens to be 0, one of 2**64, counts as that."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """When and how digests were taken."""

    step: Step
    """The optimizer step that was about to move the weights; state is as the step before left it.

    One more than the last step: of what the run ends with.
    """
    attempt: int = 0
    """Grows by one each time that this step was thrown away and computed again."""
    period: int = 1
    """State is digested piece by piece, each once in so many steps."""
    shift: int = 0
    """Not 0: this rank came to the same as the rank so many further on did, of whose group of ranks
    it computed the last micro-batch of this step once more, and all others did likewise."""
    discarded: bool = False
    """Whether the step was thrown away, before it moved anything."""


class Digests(msgspec.Struct, frozen=True, array_like=True):
    """The digests of some ranks of a node at one step, as columns."""

    taken: Taken
    ranks: tuple[Rank, ...]
    columns: tuple[str, ...]
    """For each of KINDS: `HEX_DIGITS` digits per rank, or "" if none of them has taken any."""


def column(values: tuple[int, ...]) -> str:
    """Return digests as one text; "" if none was taken."""
    if not any(values):
        return ""
    return "".join(f"{value:0{HEX_DIGITS}x}" for value in values)
