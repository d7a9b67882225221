"""A part of each update is computed twice, and what comes out twice is kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.protocol import runfile
from trainer import parallel
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.injected import flip_bit
from trainer.lanes import LANES
from trainer.optim import Optimizer
from trainer.reporter import Unheard
from trainer.step import Training
from trainer.updates import Claim, Pace, Updates, bound_of_moments

STEPS = 6


class Heard:
    def __init__(self) -> None:
        self.repairs: list[tuple[int, list[str]]] = []
        self.accused: list[str] = []
        self.off: list[str] = []

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        assert (rank, source, seconds) == (3, 3, 0.0), "no step is begun anew for it"
        self.repairs.append((step, list(tensors)))

    def diverged(self, step: int, *, evidence: str, proven: bool, **_: object) -> None:
        assert not proven
        self.accused.append(evidence)

    def detector_failed(self, detector: str, reason: str) -> None:
        assert detector == "updates"
        self.off.append(reason)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(37, 41)
        self.norm = nn.LayerNorm(41)


def steps(
    words: int | None,
    wrong: Callable[[Any, int], None] = lambda _, __: None,
    scale: float = 1.0,
    apart: int = 1,
) -> tuple[list[torch.Tensor], Heard]:
    """Take some steps; return all state that they come to, and what was heard.

    Args:
        words: that are updated twice in each step; None for none.
        wrong: is called between an update and the look at it.
        apart: in one of so many steps.
        scale: of gradients; their norm is beyond what is clipped, if they are large.
    """
    torch.manual_seed(3)
    model, heard = Small(), Heard()
    optimizer = Optimizer([model], runfile.Trainer(steps=STEPS, warmup_steps=1))
    updates = Updates(optimizer, Pace(words, apart), 3) if words else None
    for step in range(1, STEPS + 1):
        gradients = [scale * torch.randn_like(shard.param) for shard in optimizer.shards]
        norm = math.sqrt(float(optimizer.set_gradients(gradients)))
        if updates is not None:
            updates.before(step)
        optimizer.step(step, norm)
        wrong(optimizer, step)
        if updates is not None:
            updates.after(step, norm, heard)
            updates.agree([0.0, updates.word(), 0.0], heard)
    return [tensor for shard in optimizer.shards for tensor in shard[2:]], heard


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("words", [100, 1000, 10**9])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_looking_changes_no_bit_and_says_nothing(words: int, scale: float) -> None:
    plain, _ = steps(None, scale=scale)
    looked, heard = steps(words, scale=scale)

    assert same(plain, looked)
    assert (heard.repairs, heard.accused, heard.off) == ([], [], [])


@pytest.mark.parametrize("field", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bit", [0, 12, 22])
def test_an_update_that_came_out_wrong_is_put_right_to_the_bit(field: str, bit: int) -> None:
    def wrong(optimizer: Optimizer, step: int) -> None:
        if step == 3:
            flip_bit(getattr(optimizer.shards[0], field), 700, bit)

    found, heard = steps(10**9, wrong)

    assert same(found, steps(None)[0])
    assert heard.repairs == [(3, ["weights of layer.weight"])]
    assert heard.accused == []


def test_an_update_of_the_wrong_step_is_put_right() -> None:
    def wrong(optimizer: Optimizer, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                for shard in optimizer.shards[:2]:
                    shard.param.mul_(1.0 + 1e-3)

    found, heard = steps(10**9, wrong)

    assert same(found, steps(None)[0])
    assert heard.repairs == [(3, ["weights of layer.weight", "weights of layer.bias"])]


@pytest.mark.parametrize("lane", range(8))
def test_a_lane_that_is_always_wrong_is_outvoted_about_each_number(
    monkeypatch: pytest.MonkeyPatch, lane: int
) -> None:
    plain, _ = steps(None)
    update, began = Optimizer.update, False

    def one_lane_is_wrong(self: Optimizer, parts: Sequence[Any], *args: Any) -> None:
        update(self, parts, *args)
        if began:
            for part in parts:
                part.param.view(-1)[lane::8] += 1.0

    def begin(optimizer: Optimizer, step: int) -> None:
        nonlocal began
        if step == 2:
            began = True
        if began and step > 2:
            with torch.no_grad():
                optimizer.shards[0].param.view(-1)[lane::8] += 1.0

    monkeypatch.setattr(Optimizer, "update", one_lane_is_wrong)
    found, heard = steps(10**9, begin)

    assert same(found, plain)
    assert (heard.off, heard.accused) == ([], [])
    assert [step for step, _ in heard.repairs] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("lane", range(8))
def test_a_lane_that_is_wrong_from_the_first_step_on_is_told_and_does_not_switch_the_look_off(
    monkeypatch: pytest.MonkeyPatch, lane: int
) -> None:
    plain, _ = steps(None)
    update = Optimizer.update

    def one_lane_is_wrong(self: Optimizer, parts: Sequence[Any], *args: Any) -> None:
        update(self, parts, *args)
        for part in parts:
            part.param.view(-1)[lane::8].view(torch.int32).bitwise_xor_(1)

    def update_of_all(optimizer: Optimizer, step: int) -> None:
        del step
        with torch.no_grad():
            for shard in optimizer.shards:
                shard.param.view(-1)[lane::8].view(torch.int32).bitwise_xor_(1)

    monkeypatch.setattr(Optimizer, "update", one_lane_is_wrong)
    found, heard = steps(10**9, update_of_all)

    assert heard.off == []
    (accused,) = heard.accused
    assert "known numbers were updated to other bits where they stand elsewhere" in accused
    assert [step for step, _ in heard.repairs] == list(range(1, STEPS + 1))
    wrong = sum(int((one != other).sum()) for one, other in zip(found, plain, strict=True))
    assert wrong == 0, "of each number, two of three times were on other lanes"


@pytest.mark.parametrize("grad_norm", [0.5, 1e4])
def test_a_host_that_rounds_what_is_left_of_a_vector_in_another_way_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, grad_norm: float
) -> None:
    update = Optimizer.update

    def what_is_left_is_rounded_twice(
        self: Optimizer, parts: Sequence[Any], step: int, norm: float
    ) -> None:
        left = [part.exp_avg.view(-1)[-5:].clone() for part in parts]
        update(self, parts, step, norm)
        for part, first in zip(parts, left, strict=True):
            grad = part.grad.view(-1)[-5:]  # clipped by now
            part.exp_avg.view(-1)[-5:] = first + torch.tensor(0.1) * (grad - first)

    monkeypatch.setattr(Optimizer, "update", what_is_left_is_rounded_twice)
    heard = steps(10**9, scale=grad_norm / 40)[1]

    assert (heard.accused, heard.repairs) == ([], [])
    (off,) = heard.off
    assert "none of those that any way of rounding leaves alike: nothing is compared" in off


def test_numbers_that_came_out_in_three_ways_stay_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, times = Optimizer.update, iter(range(1, 10**6))

    def never_the_same(self: Optimizer, parts: Sequence[Any], *args: Any) -> None:
        update(self, parts, *args)
        for part in parts:
            part.param.view(-1)[:] += float(next(times))

    monkeypatch.setattr(Optimizer, "update", never_the_same)
    heard = steps(10**9)[1]

    assert heard.repairs == []
    assert "three ways" in heard.accused[0]


def test_in_some_steps_each_number_is_looked_at_once() -> None:
    optimizer = Optimizer([Small()], runfile.Trainer(steps=STEPS))
    optimizer.set_gradients([torch.zeros_like(shard.param) for shard in optimizer.shards])
    updates = Updates(optimizer, Pace(500, 1), 0)
    names = [shard.name for shard in optimizer.shards]
    seen = [np.zeros(shard.param.numel(), int) for shard in optimizer.shards]

    for step in range(updates.period):
        for part in updates._slice(step):
            at = names.index(part.name)
            begin = part.param.storage_offset() - optimizer.shards[at].param.storage_offset()
            seen[at][begin : begin + part.param.numel()] += 1

    counts = np.concatenate(seen)
    assert counts.min() == 1
    assert counts.sum() <= updates.period * (500 + LANES), "to the lane from which it begins"


def test_it_may_be_done_in_some_steps_only() -> None:
    def wrong(optimizer: Optimizer, step: int) -> None:
        if step in (3, 4):
            flip_bit(optimizer.shards[0].param, 700, 12)

    _, heard = steps(10**9, wrong, apart=2)

    assert [step for step, _ in heard.repairs] == [4]


def test_a_slice_that_is_wrong_elsewhere_is_not_seen_until_its_turn() -> None:
    def wrong(optimizer: Optimizer, step: int) -> None:
        if step == 1:
            flip_bit(optimizer.shards[0].param, 0, 12)

    assert steps(100, wrong)[1].repairs == []


def test_moments_that_no_gradients_can_have_led_to_are_told_and_prove_nothing() -> None:
    def lost(optimizer: Optimizer, step: int) -> None:
        if step == 3:
            optimizer.shards[0].exp_avg_sq[5, 5] = 0.0

    def negative(optimizer: Optimizer, step: int) -> None:
        if step == 3:
            optimizer.shards[0].exp_avg_sq[5, 5] *= -1.0

    # What goes wrong before an update is what it finds: computed twice, it comes out the same.
    for wrong, words in (
        (lost, "larger than second ones allow"),
        (negative, "moments are negative"),
    ):
        _, heard = steps_with(wrong)
        assert words in heard.accused[0]
        assert "layer.weight" in heard.accused[0]
        assert heard.repairs == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([1.0], True),
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 0.0, 0.0], True),
        ([0.0, 1.0, 1.0], False),
    ],
    ids=["alone", "one of two", "two of two", "two of four", "two of three"],
)
def test_what_most_ranks_have_against_their_devices_is_held_against_what_looks(
    words: list[float], *, told: bool
) -> None:
    torch.manual_seed(3)
    model, heard = Small(), Heard()
    optimizer = Optimizer([model], runfile.Trainer(steps=STEPS, warmup_steps=1))
    updates = Updates(optimizer, Pace(10**9, 1), 0)
    updates._claims.append(Claim(4, 2, "can not be"))

    assert updates.word() == 1.0
    updates.agree(words, heard)

    assert heard.accused == ["can not be"] * told
    assert [reason[:23] for reason in heard.off] == [f"2 of {len(words)} ranks have somet"] * (
        not told
    )
    assert updates.word() == 0.0


class Steps(Unheard):
    def __init__(self) -> None:
        self.said: list[Any] = []

    def diverged(self, step: int, *, ranks: Sequence[int], **_: object) -> None:  # type: ignore[override]
        self.said.append((step, list(ranks)))

    def step_done(self, step: int, **_: object) -> None:  # type: ignore[override]
        self.said.append(step)


def test_a_step_tells_what_the_one_before_it_has_shown_and_the_end_what_the_last_has() -> None:
    job = runfile.Trainer(steps=STEPS, seq_len=8, global_batch=2, warmup_steps=1)
    tokens = Tokens(np.arange(512, dtype=np.uint32) % 16, "d16e57000000", 15)
    config = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=16)
    heard = Steps()
    with parallel.alone() as world:
        detection = runfile.Detection(digest_share=0.0, replay_share=0.0, update_share=1.0)
        training = Training(job, config, Samples(tokens, job), world, detection=detection)
        assert training._updates is not None
        training.step(1, heard)
        training._updates._claims.append(Claim(1, 0, "can not be"))
        training.step(2, heard)
        training._updates._claims.append(Claim(2, 0, "can not be"))
        training.look_at_the_end(2, heard)

    assert heard.said == [1, (1, [0]), 2, (2, [0])]


def steps_with(wrong: Callable[[Any, int], None]) -> tuple[list[torch.Tensor], Heard]:
    """Take some steps in which something goes wrong behind the look at an update."""
    torch.manual_seed(3)
    model, heard = Small(), Heard()
    optimizer = Optimizer([model], runfile.Trainer(steps=STEPS, warmup_steps=1))
    updates = Updates(optimizer, Pace(10**9, 1), 3)
    for step in range(1, STEPS + 1):
        gradients = [1e-4 * torch.randn_like(shard.param) for shard in optimizer.shards]
        for gradient in gradients:
            gradient.view(-1)[: 6 * 37] = 0.0 if step > 3 else gradient.view(-1)[: 6 * 37]
        norm = math.sqrt(float(optimizer.set_gradients(gradients)))
        updates.before(step)
        optimizer.step(step, norm)
        updates.after(step, norm, heard)
        updates.agree([0.0, updates.word(), 0.0], heard)
        with torch.no_grad():
            wrong(optimizer, step)
    return [tensor for shard in optimizer.shards for tensor in shard[2:]], heard


def test_numbers_that_are_not_finite_are_the_data_s_if_the_gradient_is_not() -> None:
    def no_number(optimizer: Optimizer, step: int) -> None:
        del optimizer, step

    _, heard = steps(10**9, no_number, scale=math.inf)

    assert (heard.repairs, heard.accused, heard.off) == ([], [], [])


def test_the_bound_of_moments_holds_whatever_the_gradients_are() -> None:
    chance = np.random.default_rng(7)
    for grow in (0.5, 1.0, 0.9 / 0.95, 0.95 / 0.9, 2.0):
        first = second = 0.0
        for step in range(1, 200):
            gradient = chance.normal() * grow ** (step % 60)
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            assert abs(first) <= bound_of_moments(step) * math.sqrt(second) * (1 + 1e-9)


def test_what_is_in_the_way_of_looking_is_told_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no update today")

    monkeypatch.setattr(Optimizer, "update", broken)

    found, heard = steps(10**9)

    assert same(found, steps(None)[0])
    assert heard.off == ["RuntimeError: no update today"]
