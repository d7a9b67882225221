"""Looks at gradients as they come out of a rank's backward passes, before ranks add them up.

Letters: W weights of this rank.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from trainer.digest import digest
from trainer.guard import Guard
from trainer.optim import local
from trainer.products import Products
from trainer.turns import Turns


class Probe:
    """Digests a model's gradient as it comes out of one backward pass, and what it comes from.

    Args:
        guard: of what is not to break off that pass, in which other ranks add up with this one.
        compiled: whether layers are, which can not be looked into: then the gradient is all.

    Attributes:
        products: what it comes from, if that is looked at.
    """

    def __init__(self, guard: Guard, *, compiled: bool) -> None:
        self._guard = guard
        self.products = None if compiled else Products(guard)
        self._hooked: set[int] = set()
        self._total: Tensor | None = None
        self._active = False

    def following(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a block whose products are looked at, and those of the backward pass of it."""
        return self.products.following(model) if self.products else contextlib.nullcontext()

    def begin(self, model: nn.Module) -> None:
        """Digest what the next backward pass gives."""
        self._guard.call(lambda: self._hook_to(model), None)
        self._total, self._active = None, not self._guard.off

    def _hook_to(self, model: nn.Module) -> None:
        for name, weight in _whole_weights(model):
            if id(weight) not in self._hooked:
                self._hooked.add(id(weight))
                weight.register_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def end(self, loss: Tensor | None = None) -> Tensor:
        """Return the digest of all that was looked at, and the loss; int64, nobody waited for it.

        It means nothing if the guard says that the detector is off.
        """
        self._active = False
        total = torch.zeros((), dtype=torch.int64)
        if loss is not None:
            total = self._guard.call(lambda: digest(loss, "loss"), total.to(loss.device))
        if (products := self.products) is not None:
            total = self._guard.call(lambda: total + digest(products.sums(), "products"), total)
        return total if self._total is None else total + self._total

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(gradient: Tensor) -> None:
            if self._active:
                self._guard.call(
                    lambda: self._add(digest(local(gradient), f"micro-batch/{name}")), None
                )

        return take

    def _add(self, share: Tensor) -> None:
        self._total = share if self._total is None else self._total + share


class PutIn(NamedTuple):
    """What a rank adds to the gradient, g_r: numbers of it all."""

    total: float
    norm: float
    sizes: float
    """Sum over weights of the size of each one's sum."""


class _Group(NamedTuple):
    """Weights that FSDP adds up together, and which of their gradients have come by."""

    size: int
    came: list[tuple[int, Tensor | None]]


class Norms:
    """Norms of what the micro-batches of a step have added up to on this rank, by weight.

    And the sum of its numbers: two passes over a gradient that was just made, and so much cheaper
    than a digest. To ask for a small weight takes as long as to look at it, so those that FSDP adds
    up together are looked at together, right before it does.

    Args:
        guard: as of a `Probe`.
        turns: of what this is a part.
        each: whether micro-batches are not added up in the weights' own gradients, so that each
            is looked at; else the last shows what all of them came to.
    """

    def __init__(self, guard: Guard, turns: Turns, *, each: bool) -> None:
        self._guard, self._turns, self._each = guard, turns, each
        self._groups: list[_Group] = []
        self._hooks: list[RemovableHandle] = []
        self._norms: dict[int, list[Tensor]] = {}
        self._sums: list[Tensor] = []
        self._losses: list[Tensor] = []

    def begin(self) -> None:
        """Begin with a step, or with one that is computed once more."""
        self._norms, self._sums, self._losses = {}, [], []
        self._unhook()

    def before(self, model: nn.Module, *, last: bool) -> None:
        """Look at the next backward pass, if it shows something."""
        self._finish()
        if last or self._each:
            self._guard.call(lambda: self._hook_to(model), None)

    def after(self, loss: Tensor) -> None:
        """Take note of the loss of a micro-batch."""
        self._finish()
        self._losses.append(loss.detach())

    def found(self) -> list[float]:
        """Return the sum of losses, then the norm of each weight's gradient; 1 + W.

        Raises:
            RuntimeError: if there are no gradients, whatever has kept them from being looked at.
        """
        if not self._norms:
            raise RuntimeError("no gradient has come by")
        passes = [norm for place in sorted(self._norms) for norm in self._norms[place]]
        norms_W = torch.stack(passes).double().view(len(self._norms), -1)
        if norms_W.shape[1] > 1:
            norms_W = norms_W.square().sum(1).sqrt()
        losses = torch.stack(self._losses).double().sum()
        return [float(losses), *norms_W.flatten().tolist()]

    def put_in(self) -> PutIn | None:
        """Return what there is to say of the gradients, for `trainer.sums`; None if nothing."""
        if not self._sums:
            return None
        norms = torch.stack([norm for each in self._norms.values() for norm in each]).double()
        sums = torch.stack(self._sums).double()
        return PutIn(float(sums.sum()), float(norms.norm()), float(sums.abs().sum()))

    def _hook_to(self, model: nn.Module) -> None:
        with self._turns.looking():
            place = 0
            # Asked for each time: who keeps weights whose hooks lead back here keeps their world.
            for weights in _whole_weights_by_group(model):
                group = _Group(len(weights), [])
                self._groups.append(group)
                look = partial(self._look, group)
                for weight in weights:
                    hook = self._hook(group, place, look)
                    self._hooks.append(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
                    place += 1

    def _finish(self) -> None:
        """Look at what groups have of which some weights had no part in the pass; let go of all."""
        for group in self._groups:
            if group.came:
                self._guard.call(partial(self._look, group), None)
        self._unhook()

    def _unhook(self) -> None:
        # Called in each pass, hooks take longer than to be put there once in a while.
        for hook in self._hooks:
            hook.remove()
        self._groups, self._hooks = [], []

    def _hook(
        self, group: _Group, place: int, look: Callable[[], None]
    ) -> Callable[[nn.Parameter], None]:
        size, came = group

        def take(weight: nn.Parameter) -> None:
            # Called for each weight, so no more than this.
            came.append((place, weight.grad))
            if len(came) == size:
                self._guard.call(look, None)

        return take

    def _look(self, group: _Group) -> None:
        came = list(group.came)
        group.came.clear()
        with self._turns.looking():
            gradients = [local(gradient) for _, gradient in came if gradient is not None]
            norms = torch._foreach_norm(gradients)  # noqa: SLF001 - torch's own name
            for (place, _), gradient, norm in zip(came, gradients, norms, strict=True):
                self._norms.setdefault(place, []).append(norm)
                self._sums.append(gradient.sum(dtype=torch.float32))


def drop(parts: Sequence[nn.Module]) -> None:
    """Forget gradients that ranks have not added up."""
    for fsdp in (each for part in parts for group in _fsdp_groups(part) for each in group):
        fsdp.unsharded_accumulated_grad = None
        if hasattr(fsdp, "_unsharded_param"):
            fsdp._unsharded_param.grad = None  # noqa: SLF001 - the public name asks for its data


def _whole_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights as layers see them, which is where gradients of one rank come to be.

    FSDP makes them with the first forward pass, and keeps the tensors for the life of the model.
    """
    weights = itertools.chain.from_iterable(_whole_weights_by_group(model))
    for number, weight in enumerate(weights):
        yield str(number), weight


def _whole_weights_by_group(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    for group in _fsdp_groups(model):
        yield [fsdp.unsharded_param for fsdp in group]


def _fsdp_groups(model: nn.Module) -> Iterator[list[Any]]:
    """Yield FSDP's own of each weight, those together that are added up together."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()  # noqa: SLF001 - no public name has them
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
        yield from (group.fsdp_params for group in groups if group is not None)
