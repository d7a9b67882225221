"""Faults of a plan that strike within a rank's computation and raise no error.

They know nothing of what looks for them, and that knows nothing of these.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.protocol.rank import Misbehave
from trainer.data import Batch, Batches
from trainer.straying import at_next_sum, enter_another, leave_out
from trainer.watch import Held

FORWARDS = 3
"""What a product costs with its two gradients, in forward products."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Injected:
    """What one rank was told to do wrong."""

    def __init__(self, parts: Sequence[nn.Module], samples: Batches) -> None:
        self._parts, self._samples = parts, samples
        self._flips: list[Mapping[str, str | int | float]] = []
        self._step = 0
        self._chance = np.random.Generator(np.random.Philox(0))

    def take(self, order: Misbehave) -> None:
        """Take in an order of the agent, for the steps to come."""
        match order.how:
            case "flip-bit":
                self._flips.append(order.options)
            case "wrong-matmul":
                self._spoil(order.options)
            case "overload-rank":
                self._overload(float(order.options["times"]))
            case "skip-collective":
                at_next_sum(leave_out)
            case "mismatch-collective":
                at_next_sum(enter_another)
            case "stall-data":
                self._stall(order.options.get("delay"))
            case _:
                raise ValueError(f"unknown misbehaviour {order.how!r}")

    def is_due(self, step: int) -> bool:
        """Whether some state is to be changed in a step."""
        return any(step >= int(flip["atStep"]) for flip in self._flips)

    @torch.no_grad()
    def strike(self, step: int, held: Iterable[Held]) -> None:
        """Do what is due in `step` to the kinds of state that are at hand."""
        self._step = step
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

    def _spoil(self, wrong: Mapping[str, str | int | float]) -> None:
        """Have what layers multiply come out wrong from now on.

        As on a bad device, it does so wherever this rank computes: also what it computes once more.
        """

        def spoiled(_: nn.Module, __: object, product: Tensor) -> Tensor:
            late = self._step >= int(wrong["atStep"])
            if not late or self._chance.random() >= float(wrong["chance"]):
                return product
            product = product.clone()
            product.view(-1)[int(wrong["element"]) % product.numel()] += float(wrong["magnitude"])
            return product

        for part in self._parts:
            for name, module in part.named_modules():
                if isinstance(module, nn.Linear) and wrong["tensor"] in ("", f"{name}.weight"):
                    module.register_forward_hook(spoiled)

    def _overload(self, times: float) -> None:
        """Have layers multiply again and again, and throw it away: work that nobody counts."""
        due = 0.0

        def again(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
            nonlocal due
            due += FORWARDS * (times - 1)
            with torch.no_grad():
                while due >= 1:
                    due -= 1
                    module.forward(*given)

        for part in self._parts:
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(again)

    def _stall(self, delay_s: str | float | None) -> None:
        """Have samples come late, or never: as from a disk, whoever reads them waits for them."""
        read = self._samples.batch

        def late(step: int, indices: range) -> Batch:
            threading.Event().wait(None if delay_s is None else float(delay_s))
            return read(step, indices)

        self._samples.batch = late  # type: ignore[method-assign]


def flip_bit(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flip one bit of an item of a contiguous tensor, in place; bit 0 is the least significant."""
    size = 8 * tensor.element_size()
    words = tensor.view(-1).view(_WORDS[tensor.element_size()])
    mask = 1 << (bit % size)
    if mask >> (size - 1) and size > 8:
        mask -= 1 << size
    words[element] = words[element] ^ mask
