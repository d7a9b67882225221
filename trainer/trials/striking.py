"""Where in a rank something goes wrong, and when: what is put around a training for one trial.

It reaches into the training from outside, through hooks and attributes, and takes all of it away
again. Nothing that looks for corruption knows of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orchestrator.protocol.injections import Injection
from trainer.data import Batch, Batches
from trainer.model import RMSNorm
from trainer.step import Training
from trainer.trials.forms import spoil, spoiled

_STATES = ("weights", "exp_avg", "exp_avg_sq")


class Striking:
    """One injection in one rank.

    Args:
        training: what is struck.
        how: the fault.
        first: the step that its steps count from.

    Attributes:
        struck: how often it changed something.
    """

    def __init__(self, training: Training, how: Injection, first: int) -> None:
        self.struck = 0
        self.how = how
        self._training, self._first = training, first
        self._step = self._passes = 0
        self._chance = np.random.Generator(np.random.Philox(how.seed))

    def begin(self, step: int) -> None:
        """Hear that a step begins; strike the state that it begins with, if that is due."""
        self._step, self._passes = step - self._first, 0
        if self.how.site in _STATES and self.due():
            self.spoil(self._of_state())

    def due(self, passes: int = 1) -> bool:
        """Return whether this time is one; `passes` is how often a step comes by here."""
        how = self.how
        number, self._passes = self._passes, self._passes + 1
        match how.pace:
            case "once":
                return self._step == how.step and number == how.micro % passes
            case "always":
                return self._step >= how.step
            case "chance":
                return self._step >= how.step and self._chance.random() < how.chance

    def spoil(self, tensor: Tensor) -> None:
        """Make a tensor wrong in place."""
        self.struck += spoil(tensor, self.how)

    def spoiled(self, tensor: Tensor) -> Tensor:
        """Return a copy that is wrong."""
        copied, changed = spoiled(tensor, self.how)
        self.struck += changed
        return copied

    def pick(self, candidates: list[Any]) -> Any:  # noqa: ANN401 - layers or tensors
        """Return the one that the injection means."""
        return candidates[int(self.how.place * len(candidates))]

    def _of_state(self) -> Tensor:
        shard = self.pick(self._training.optimizer.shards)
        tensor = shard.param if self.how.site == "weights" else getattr(shard, self.how.site)
        assert isinstance(tensor, Tensor)
        return tensor


@contextlib.contextmanager
def striking(training: Training, how: Injection, first: int) -> Iterator[Striking]:
    """Have a fault in a training for as long as the block lasts."""
    it = Striking(training, how, first)
    undo = _SITES.get(how.site, _nothing)(training, it)
    try:
        yield it
    finally:
        undo()


Undo = Callable[[], None]


def _nothing(training: Training, it: Striking) -> Undo:
    """Struck by whoever owns what is struck: the state between steps, digests, staged bytes."""
    del training, it
    return lambda: None


def _sum(training: Training, it: Striking) -> Undo:
    """The sum over ranks, as it arrives."""
    optimizer = training.optimizer
    real = optimizer.set_gradients

    def arrived(gradients: list[Tensor]) -> Tensor:
        if it.due():
            it.spoil(it.pick(gradients))
        return real(gradients)

    return replace(optimizer, "set_gradients", arrived)


def _update(training: Training, it: Striking) -> Undo:
    """What the optimizer makes of weights."""
    optimizer = training.optimizer
    real = optimizer.step

    def moved(step: int, grad_norm: float) -> None:
        real(step, grad_norm)
        if it.due():
            it.spoil(it.pick(optimizer.shards).param)

    return replace(optimizer, "step", moved)


def _step_counter(training: Training, it: Striking) -> Undo:
    """The step that the optimizer takes this one for, and so its learning rate."""
    optimizer = training.optimizer
    real = optimizer.step

    def moved(step: int, grad_norm: float) -> None:
        wrong = it.due()
        it.struck += wrong
        real(step + wrong, grad_norm)

    return replace(optimizer, "step", moved)


def _local_gradient(training: Training, it: Striking) -> Undo:
    """What a product gives for a weight, before anybody has looked at it."""
    return _gradient(training, it, first=True)


def _bucket(training: Training, it: Striking) -> Undo:
    """The same in memory, after that and before it is added to anything."""
    return _gradient(training, it, first=False)


def _gradient(training: Training, it: Striking, *, first: bool) -> Undo:
    layer = it.pick(_products(training))
    hooked: list[RemovableHandle] = []

    def watch(module: nn.Module, _: Any) -> None:  # noqa: ANN401 - a hook's signature
        while hooked:
            hooked.pop().remove()
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.requires_grad and torch.is_grad_enabled():
            hooked.append(weight.register_hook(wrong))  # type: ignore[no-untyped-call]
            if first:
                # Hooks are called as they were put in, and others are there already.
                hooks: Any = weight._backward_hooks  # noqa: SLF001 - nothing public orders them
                later = [name for name in hooks if name != hooked[-1].id]
                for name in later:
                    hooks[name] = hooks.pop(name)

    def wrong(gradient: Tensor) -> Tensor:
        return it.spoiled(gradient) if it.due(_passes(training)) else gradient

    hook = layer.register_forward_pre_hook(watch)

    def undo() -> None:
        hook.remove()
        while hooked:
            hooked.pop().remove()

    return undo


def _product(training: Training, it: Striking) -> Undo:
    """What a layer's product comes to, forward."""

    def wrong(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ANN401 - a hook's
        del module, inputs
        if it.due(_passes(training)):
            it.spoil(output.data)

    hook: RemovableHandle = it.pick(_products(training)).register_forward_hook(wrong)
    return hook.remove


def _product_back(training: Training, it: Striking) -> Undo:
    """What a layer's product comes to, backward, for what is below it."""

    def wrong(module: nn.Module, inputs: Any, outputs: Any) -> Any:  # noqa: ANN401 - a hook's
        del module, outputs
        (gradient,) = inputs
        return (it.spoiled(gradient),) if it.due(_passes(training)) else None

    hook: RemovableHandle = it.pick(_products(training)).register_full_backward_hook(wrong)
    return hook.remove


def _activation(training: Training, it: Striking) -> Undo:
    """What lies in memory from the forward pass to the backward pass."""
    norms = [m for part in training.stages for m in part.modules() if isinstance(m, RMSNorm)]
    kept: list[Tensor] = []
    real = training.loss

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ANN401 - a hook's
        del module, inputs
        # `detach` would count this as a change by the program, and autograd would refuse it.
        kept[:] = [output.data]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        value = real(logits, targets)
        if kept and it.due(_passes(training)):
            it.spoil(kept[0])
        kept.clear()
        return value

    hook = it.pick(norms).register_forward_hook(keep)
    undo = replace(training, "loss", loss)

    def undo_both() -> None:
        hook.remove()
        undo()

    return undo_both


class _WrongTokens:
    """Samples of which a rank is handed other ones than it should be."""

    def __init__(self, samples: Batches, it: Striking, passes: int) -> None:
        self._samples, self._it, self._passes = samples, it, passes

    @property
    def mark(self) -> float:
        """Of the real ones: it is taken of what lies on disk."""
        return self._samples.mark

    def batch(self, step: int, indices: range) -> Batch:
        batch = self._samples.batch(step, indices)
        if not self._it.due(self._passes):
            return batch
        inputs = self._it.spoiled(torch.from_numpy(batch.inputs)).numpy()
        return batch._replace(inputs=inputs)


def _tokens(training: Training, it: Striking) -> Undo:
    return replace(
        training, "samples", _WrongTokens(training.samples, it, len(training.share.micro_batches))
    )


_SITES: dict[str, Callable[[Training, Striking], Undo]] = {
    "gradient": _sum,
    "delivered": _sum,
    "update": _update,
    "step-counter": _step_counter,
    "local-gradient": _local_gradient,
    "bucket": _bucket,
    "matmul": _product,
    "input-gradient": _product_back,
    "activation": _activation,
    "tokens": _tokens,
}


def _products(training: Training) -> list[nn.Module]:
    return [m for part in training.stages for m in part.modules() if isinstance(m, nn.Linear)]


def _passes(training: Training) -> int:
    return len(training.share.micro_batches)


def replace(owner: Any, name: str, value: Any) -> Undo:  # noqa: ANN401 - whatever it is
    """Have an object have another attribute than it had, until that is undone."""
    # What is found on the class goes back to being that; None of its own is something else.
    own, had = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if own:
            setattr(owner, name, had)
        else:
            delattr(owner, name)

    return undo
