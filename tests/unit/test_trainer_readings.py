"""What is read beside a step keeps it, and who looks for ranks that stand still, not for long."""

from orchestrator.detect import hang
from trainer import readings


def test_a_step_waits_for_what_is_read_beside_it_no_longer_than_a_hang_has_room_for() -> None:
    assert readings.WITHIN_S <= hang.STARVED_APART_S / 2
