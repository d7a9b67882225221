"""Adds up what goes into and comes out of the products of one micro-batch, forward and backward.

A low bit that one product gets wrong is often rounded away before it reaches the gradient of the
very micro-batch that is computed once more, while it reaches that of another one. So what a
gradient comes from is looked at as well, on its way: what a layer computes with, and what it made
of that. No change of one word leaves a sum of words as it was, and such a sum takes a few percent
of what a digest takes. Several changes may add up to nothing: what they do to the gradient is seen
by its digest, or they were rounded away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.digest import digest
from trainer.guard import Guard
from trainer.optim import local
from trainer.parallel import World
from trainer.replay import halves

FORWARD = ("what went into {}", "what came out of {}")
BACKWARD = ("the gradient of what came out of {}", "the gradient of what went into {}")
"""What is looked at of each layer, in the order in which one follows from the other."""
SHOWN_MAX = 3
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Layer(NamedTuple):
    """What was found of one: the sums of each direction, once it was computed."""

    name: str
    forward: list[Tensor]
    backward: list[Tensor]


class Products:
    """Those of a model's linear layers, in one forward pass and the backward pass that follows.

    Args:
        guard: of what is not to break off these passes, in which other ranks wait for this one.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._hooks: list[RemovableHandle] = []
        self._layers: list[_Layer] = []
        self._last: tuple[Tensor, Tensor] | None = None
        """What a layer was given at last, and its sum: the next ones may be given it, too."""

    @contextlib.contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Look at what is computed in a block, and at the backward pass of that."""
        self._layers = []
        self._guard.call(lambda: self._hook_to(model), None)
        try:
            yield
        finally:
            # Before the backward pass, which may compute layers again: they are looked at once.
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._last = [], None

    def sums(self) -> Tensor:
        """Return what was found, in the order in which one follows from the other; int64."""
        found = [each for layer in self._layers for each in layer.forward]
        found += [each for layer in reversed(self._layers) for each in layer.backward]
        return torch.stack(found) if found else torch.zeros(1, dtype=torch.int64)

    def what(self) -> list[str]:
        """Return in words what each of the `sums` is of."""
        there = [f"{form.format(each.name)}, forward" for each in self._layers for form in FORWARD]
        back = reversed(self._layers)
        return there + [f"{form.format(each.name)}, backward" for each in back for form in BACKWARD]

    def _hook_to(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                before, after = self._pair(_Layer(name, [], []))
                self._hooks.append(module.register_forward_pre_hook(before))
                self._hooks.append(module.register_forward_hook(after))

    def _pair(self, layer: _Layer) -> tuple[Any, Any]:
        """Return hooks for before and after a layer, with the signatures that torch asks for."""

        def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            return self._guard.call(lambda: (self._take(layer, inputs[0], sent),), None)

        def after(_: nn.Module, __: tuple[Tensor], made: Tensor) -> None:
            self._guard.call(lambda: self._take_out(layer, made, came), None)

        def came(gradient: Tensor) -> None:
            self._guard.call(lambda: self._take_back(layer, 0, gradient), None)

        def sent(gradient: Tensor) -> None:
            self._guard.call(lambda: self._take_back(layer, 1, gradient), None)

        return before, after

    def _take(self, layer: _Layer, given: Tensor, sent: Callable[[Tensor], None]) -> Tensor:
        if self._last is None or self._last[0] is not given:
            self._last = given, _sum(given)
        layer.forward.append(self._last[1])
        layer.backward.extend([torch.zeros_like(self._last[1])] * len(BACKWARD))
        self._layers.append(layer)
        return _Passed.apply(given, sent)  # type: ignore[no-any-return, no-untyped-call]

    def _take_out(self, layer: _Layer, made: Tensor, came: Callable[[Tensor], None]) -> None:
        layer.forward.append(_sum(made))
        made.register_hook(came)  # type: ignore[no-untyped-call]

    def _take_back(self, layer: _Layer, place: int, gradient: Tensor) -> None:
        layer.backward[place] = _sum(gradient)


class _Passed(torch.autograd.Function):
    """Passes on what a layer is given, which others may be given, too; shows what it sends back.

    Not torch's own hook of a module's backward pass: that makes views of what comes out as well,
    and FSDP warns of a model that returns one.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, show: Callable[[Tensor], None]) -> Tensor:  # noqa: ANN401 - torch's own
        """Return it as it is."""
        ctx.show = show
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own
        """Return its gradient as it is."""
        ctx.show(gradients[0])
        return gradients[0], None


def _sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's words, of 64 bits if they are that many, modulo 2**64."""
    flat = local(tensor).detach().contiguous().reshape(-1)
    size = flat.element_size()
    whole = not (flat.numel() * size % 8 or flat.storage_offset() * size % 8)
    return flat.view(torch.int64 if whole else _WORD[size]).sum(dtype=torch.int64)


class Seen:
    """What one rank saw of the products of micro-batches, its own and others', in a step."""

    def __init__(self) -> None:
        self._of: list[tuple[int, Tensor]] = []
        self._what: list[str] = []

    def begin(self) -> None:
        """Begin with a step, or begin anew."""
        self._of = []

    def take(self, of: int, products: Products) -> None:
        """Take note of what was found of a rank's micro-batch."""
        self._of.append((of, products.sums()))
        self._what = products.what()

    def where(self, world: World, tried: Sequence[int], ranks: Sequence[int]) -> str:
        """Say where ranks first had something else than most; "" if nothing is known of that.

        Collective.

        Args:
            world: of those who have seen products of whole micro-batches.
            tried: whose micro-batches all of them have computed at last.
            ranks: who is to be spoken of.
        """
        words: dict[int, str] = {}
        for of in tried:
            last = next(sums for whose, sums in reversed(self._of) if whose == of)
            said = [tuple(row) for row in world.gather(halves(digest(last, "products").view(1)))]
            source = reference(said, ranks)
            right = last.clone()
            world.wait(dist.broadcast(right, source, async_op=True))
            first = [_first(sums, right) for whose, sums in self._of if whose == of]
            places = world.gather([min(first)])
            for rank in ranks:
                at, who = int(places[rank][0]), f"rank {rank} differs from rank {source}"
                if at < len(right):
                    words[rank] = f"{who} first in {self._what[at]}"
                elif rank != source:
                    words.setdefault(rank, f"{who} in gradients of weights, and not before")
        return "; ".join(words[rank] for rank in sorted(words)[:SHOWN_MAX])


def reference(said: Sequence[tuple[float, ...]], accused: Sequence[int]) -> int:
    """Return a rank that says what most say, and is not accused of anything if there is one.

    Who is wrong in gradients alone has products as all have them, and is to be compared, too.

    Args:
        said: of each rank, a digest.
        accused: ranks.
    """
    most = max(sorted(set(said)), key=said.count)
    holding = [rank for rank, own in enumerate(said) if own == most]
    return next((rank for rank in holding if rank not in accused), holding[0])


def _first(sums: Tensor, right: Tensor) -> int:
    """Return the place of the first that differs; how many there are if none does."""
    differs = (sums != right).nonzero()
    return int(differs[0]) if len(differs) else len(right)
