"""Digests a micro-batch on its way through the stages of a rank; `trainer.blame` has the order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.blame import LINKS
from trainer.digest import digest
from trainer.gradients import Probe
from trainer.guard import Guard
from trainer.optim import local

RECEIVED, SENT, RECEIVED_BACK, SENT_BACK = range(len(LINKS))


class Trace:
    """That of a rank.

    Args:
        guard: of what is not to break off a pass, in which other ranks wait for this one.
        stages: the numbers of this rank's stages.
        device: on which they are.
        compiled: as of a `Probe`.
    """

    def __init__(
        self, guard: Guard, stages: Sequence[int], device: torch.device, *, compiled: bool
    ) -> None:
        self._guard, self._device = guard, device
        self._found: dict[int, list[Tensor]] = {stage: [] for stage in stages}
        self._probes = {stage: Probe(guard, compiled=compiled) for stage in stages}

    def begin(self) -> None:
        """Begin with a micro-batch."""
        for stage in self._found:
            nothing = torch.zeros((), dtype=torch.int64, device=self._device)
            self._found[stage] = [nothing] * len(LINKS)

    def following(self, stage: int, part: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a block in which a stage computes; as of a `Probe`."""
        return self._probes[stage].following(part)

    def forward(self, stage: int, x: Tensor, out: Tensor) -> None:
        """Digest what a stage computes from what, and both again on the way back.

        Args:
            stage: its number.
            x: what it received; tokens are read anew by whoever computes them once more.
            out: what it sends on; of the last stage the loss.
        """
        self._guard.call(lambda: self._follow(stage, x, out), None)

    def before_backward(self, stage: int, part: nn.Module) -> None:
        """Digest the gradients of a stage's weights, in the pass that follows."""
        self._probes[stage].begin(part)

    def after_backward(self, stage: int) -> None:
        """Hear that the pass is over."""
        found = self._found[stage]
        found[SENT_BACK] = found[SENT_BACK] + self._probes[stage].end()

    def end(self) -> Tensor:
        """Return what was found of all stages, int64, in the order of `blame.LINKS`.

        It means nothing if the guard says that the detector is off.
        """
        return torch.stack([link for found in self._found.values() for link in found])

    def _follow(self, stage: int, x: Tensor, out: Tensor) -> None:
        self._take(stage, SENT, out.detach())
        if out.dim() > 0:
            out.register_hook(self._hook(stage, RECEIVED_BACK))  # type: ignore[no-untyped-call]
        if x.is_floating_point():
            self._take(stage, RECEIVED, x.detach())
            x.register_hook(self._hook(stage, SENT_BACK))  # type: ignore[no-untyped-call]

    def _hook(self, stage: int, link: int) -> Callable[[Tensor], None]:
        def take(gradient: Tensor) -> None:
            self._guard.call(lambda: self._take(stage, link, gradient), None)

        return take

    def _take(self, stage: int, link: int, value: Tensor) -> None:
        found = self._found[stage]
        found[link] = found[link] + digest(local(value), "link")
