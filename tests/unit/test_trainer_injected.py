"""Faults of a plan that a rank commits within what it computes, and that change no number."""

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.protocol import runfile
from orchestrator.protocol.rank import Misbehave
from trainer.data import Samples
from trainer.injected import FORWARDS, Injected
from trainer.tokens import Tokens


class Counted(nn.Linear):
    """Counts its products."""

    products = 0

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return super().forward(given)


@pytest.fixture
def samples() -> Samples:
    ids = np.arange(64, dtype=np.uint32) % 16
    return Samples(Tokens(ids, "0", 0), runfile.Trainer(global_batch=1, seq_len=8))


@pytest.mark.parametrize("times", [1.25, 2.0, 3.5])
def test_more_work_is_as_many_products_more_and_the_same_gradient(
    samples: Samples, times: float
) -> None:
    torch.manual_seed(0)
    layer = Counted(4, 4)
    given = torch.randn(2, 4)
    layer(given).sum().backward()
    assert layer.weight.grad is not None
    plain = layer.weight.grad.clone()
    layer.zero_grad()
    layer.products = 0

    Injected([layer], samples).take(Misbehave(how="overload-rank", options={"times": times}))
    for _ in range(8):
        layer(given)

    assert layer.products == 8 + round(8 * FORWARDS * (times - 1))
    layer(given).sum().backward()
    assert torch.equal(layer.weight.grad, plain)


def test_samples_that_come_late_are_the_same_samples(samples: Samples) -> None:
    plain = samples.batch(3, range(1))

    injected = Injected([], samples)
    injected.take(Misbehave(how="stall-data", options={"delay": 0.001}))

    late = samples.batch(3, range(1))
    assert np.array_equal(late.inputs, plain.inputs)
    assert np.array_equal(late.targets, plain.targets)


def test_what_no_trainer_can_commit_is_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match="unknown misbehaviour 'dance'"):
        Injected([], samples).take(Misbehave(how="dance", options={"times": 2.0}))
