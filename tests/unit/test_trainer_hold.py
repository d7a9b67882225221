"""How ranks wait for orders when one holds something else than its twin."""

import pytest

from trainer import hold
from trainer.hold import Hold

AGREE, APART = [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0], [1.0, 9.0]]


class OrdersError(Exception):
    """Orders have come."""


def ordered() -> None:
    raise OrdersError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "HOLD_S", 0.03)


def test_nobody_waits_where_all_that_hold_the_same_shard_agree() -> None:
    held = Hold([0, 1, 0])

    held(AGREE, ordered)
    held([[1.0, 2.0], [3.0, 4.0], None], ordered)  # it has none any more


def test_who_differs_waits_until_orders_come() -> None:
    held = Hold([0, 1, 0])

    with pytest.raises(OrdersError):
        held(APART, ordered)
    with pytest.raises(OrdersError):
        held(APART, ordered)


def test_if_nobody_came_once_training_is_not_held_again() -> None:
    held, asked = Hold([0, 1, 0]), []

    held(APART, lambda: asked.append(1))
    assert asked

    held(APART, ordered)
