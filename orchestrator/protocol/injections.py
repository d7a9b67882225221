"""What a campaign has a rank do wrong, as data: where, in which form, and how often.

The conductor of a campaign draws it, the injector in a rank carries it out (trainer.injecting).
What looks for it never sees this.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from orchestrator.protocol.ids import Rank

Site = Literal[
    "weights",
    "exp_avg",
    "exp_avg_sq",
    "gradient",
    "delivered",
    "update",
    "step-counter",
    "local-gradient",
    "bucket",
    "activation",
    "matmul",
    "input-gradient",
    "tokens",
    "staged",
    "copied",
    "digest",
]
"""Where. `gradient` is the sum over ranks as one rank got it, `delivered` as all of them did;
`update` what the optimizer makes of it; `local-gradient` what a product gives for a weight,
`bucket` the same in memory until it is added up; `activation` what is kept for the backward pass;
`matmul` and `input-gradient` what a layer's products come to, forward and backward; `staged` the
bytes of a checkpoint once they have digests, `copied` before."""

Form = Literal[
    "flip", "tile", "stuck", "tiny", "huge", "inf", "nan", "bias", "swap", "stale", "zeros"
]
"""How numbers come out wrong. `flip`: bits of some elements; `tile`: bits of four neighbours on a
period; `stuck`: elements have one value whatever they should be; `tiny`, `huge` and `inf`: they
are replaced by that; `bias`: too large by a thousandth; `swap`: two neighbours change places;
`stale`: a block is what another block is; `zeros`: a block is zero."""

Pace = Literal["once", "always", "chance"]
"""How often: one time, every time from a step on, or every time with a probability."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Magnitudes, `low <= |x| < high`: a fault may strike only within."""

    low: float
    high: float


class Injection(msgspec.Struct, frozen=True, kw_only=True):
    """One fault within the computation of a rank."""

    site: Site
    form: Form
    rank: Rank
    """Whose device it is; `delivered` strikes all ranks alike."""
    step: int
    """The first step that it may strike in."""
    pace: Pace = "once"
    chance: float = 1.0
    """Of `chance`: the probability for each micro-batch, or step, in (0, 1]."""
    micro: int = 0
    """Of `once`, where a site is passed several times a step: which time, counted around."""
    place: float = 0.0
    """Which tensor or layer of those at the site, as a share of their number, in [0, 1)."""
    element: float = 0.0
    """Where in it, the same way."""
    bits: tuple[int, ...] = ()
    """Of `flip` and `tile`: which bits of a word of 32, 0 the least significant."""
    elements: int = 1
    """How many."""
    within: Span | None = None
    """Which numbers it strikes; all without."""
    seed: int = 0
    """Of what chance decides in the rank."""
