"""Faults of a plan that strike within a rank's computation and raise no error.

They know nothing of what looks for them, and that knows nothing of these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch

from orchestrator.protocol.rank import Misbehave
from trainer.watch import Held

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Injected:
    """What one rank was told to do wrong."""

    def __init__(self) -> None:
        self._flips: list[Mapping[str, str | int | float]] = []

    def take(self, order: Misbehave) -> None:
        """Take in an order of the agent, for the steps to come."""
        self._flips.append(order.options)

    @torch.no_grad()
    def strike(self, step: int, held: Iterable[Held]) -> None:
        """Do what is due in `step` to the kinds of state that are at hand."""
        if not self._flips:
            return
        tensors = {str(each.kind): each.tensors for each in held}
        due = [f for f in self._flips if f["state"] in tensors and step >= int(f["atStep"])]
        for flip in due:
            self._flips.remove(flip)
            known = tensors[str(flip["state"])]
            name, tensor = next((pair for pair in known if pair[0] == flip["tensor"]), known[0])
            if not tensor.numel():
                continue
            element, bit = int(flip["element"]) % tensor.numel(), int(flip["bit"])
            flip_bit(tensor, element, bit)
            print(  # noqa: T201 - the rank's log
                f"fault plan: flipped bit {bit} of element {element} of {flip['state']} of {name} "
                f"in step {step}",
                file=sys.stderr,
            )


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flip one bit of an item of a contiguous tensor, in place; bit 0 is the least significant."""
    size = 8 * tensor.element_size()
    words = tensor.view(-1).view(_WORDS[tensor.element_size()])
    mask = 1 << (bit % size)
    if mask >> (size - 1) and size > 8:
        mask -= 1 << size
    words[element] = words[element] ^ mask
