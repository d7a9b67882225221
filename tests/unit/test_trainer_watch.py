"""A program's own model and optimizer are digested once a step, for whoever compares replicas."""

import pytest
import torch
from torch import nn

from orchestrator.protocol.digests import Kind, Taken
from trainer import watch
from trainer.digest import digest
from trainer.injected import flip_bit
from trainer.turns import Turns
from trainer.watch import Held, Watch, Watched, period_of, read


class Heard:
    def __init__(self) -> None:
        self.rows: list[tuple[Taken, dict[Kind, int]]] = []

    def digested(self, taken: Taken, digests: dict[Kind, int]) -> None:
        self.rows.append((taken, digests))


def trained(steps: int, *, flip_after: int | None = None, period: int = 1) -> Heard:
    torch.manual_seed(1)
    model, heard = nn.Linear(8, 8), Heard()
    optimizer = torch.optim.AdamW(model.parameters())
    watched = Watched(model, optimizer, heard, period=period)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.ones(2, 8) * step).sum().backward()
        watched.before(step)
        optimizer.step()
        if step == flip_after:
            flip_bit(optimizer.state[model.weight]["exp_avg_sq"], 3, 1)
    return heard


def test_replicas_of_a_program_have_the_same_digests_until_a_bit_flips_in_one() -> None:
    replica, other = trained(4), trained(4, flip_after=2)

    assert replica.rows[:2] == other.rows[:2]
    differ = [k for k in replica.rows[2][1] if replica.rows[2][1][k] != other.rows[2][1][k]]
    assert differ == ["exp_avg_sq"]
    assert [set(digests) for _, digests in replica.rows] == [
        {"weights", "gradient"},
        *3 * [{"weights", "exp_avg", "exp_avg_sq", "gradient"}],
    ]


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pieces spread over all steps, however few words they have."""
    monkeypatch.setattr(watch, "TURN_WORDS", 1)


@pytest.mark.usefixtures("each_step")
def test_each_piece_is_looked_at_once_in_a_period() -> None:
    held = [Held("weights", [("a", torch.ones(30)), ("b", torch.ones(20)), ("c", torch.ones(9))])]
    looks = Watch(held, Turns.fixed(3))

    seen = [read(looks.look(step, held)).get("weights", 0) for step in (1, 2, 3)]

    assert len(set(seen)) == 3
    assert sum(seen) % (1 << 64) == read(looks.look(1, held, whole=True))["weights"]
    assert read(looks.look(4, held)) == read(looks.look(1, held))


def test_few_words_are_looked_at_together_and_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has looked at for a while takes long to begin with: half of it at a time."""
    sizes = (300, 200, 180, 100)
    held = [Held("weights", [(str(size), torch.ones(size)) for size in sizes])]
    monkeypatch.setattr(watch, "CALL_WORDS", 0)
    monkeypatch.setattr(watch, "TURN_WORDS", sum(sizes) // 2)
    looks = Watch(held, Turns.fixed(8))

    slots = [{int(piece.name) for piece in slot} for slot in looks._slots]

    assert [step for step, slot in enumerate(slots) if slot] == [1, 5]
    assert slots[1] | slots[5] == set(sizes)
    assert looks.period(1) == 8
    assert [step for step in range(8) if looks.due(step)] == [1, 5]
    assert looks.look(8, held) == {}
    shares = [read(looks.look(step, held))["weights"] for step in (9, 13)]
    assert sum(shares) % (1 << 64) == read(looks.look(1, held, whole=True))["weights"]


@pytest.mark.usefixtures("each_step")
def test_no_piece_is_out_of_sight_for_longer_than_is_said_while_turns_change() -> None:
    held = [Held("weights", [(str(n), torch.full((40 + n,), 1.0 + n)) for n in range(23)])]
    looks, seen = Watch(held, Turns(0.5, 4)), {str(n): 0 for n in range(23)}
    for step in range(1, 120):
        slot = looks._slots[step % len(looks._slots)]
        names = {piece.name for piece in slot}
        due = ((name, tensor) for name, tensor in held[0].tensors if name in names)
        shares = [digest(tensor, f"weights/{name}") for name, tensor in due]
        assert read(looks.look(step, held)) == read({"weights": torch.stack(shares).sum()})
        seen |= dict.fromkeys(names, step)
        assert step - min(seen.values()) < max(looks.period(step), 4)
        costs = {20: 5.5, 30: 8.0, 60: 1.0, 90: 4.0}.get(step, 0.0)
        looks.agree(step, [costs] * 3)

    assert looks.period(119) == 8


@pytest.mark.parametrize(("share", "period"), [(1.0, 1), (0.01, 10)])
def test_less_time_makes_a_longer_period(share: float, period: int) -> None:
    assert period_of(1e6, 6e8, "cpu", share) == period
