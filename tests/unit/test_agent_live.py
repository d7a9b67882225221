"""What an agent makes of the beacon of a rank that takes steps."""

from pathlib import Path
from typing import Any, cast

from orchestrator.agent.live import LiveRank
from orchestrator.protocol.ids import Generation, Step
from orchestrator.worker.beacon import BeaconWriter, create


def test_a_pace_is_what_the_steps_took_on_average_since_it_was_last_asked_for(
    tmp_path: Path,
) -> None:
    create(tmp_path / "beacon")
    writer = BeaconWriter(tmp_path / "beacon")
    live = LiveRank(cast("Any", None), tmp_path / "beacon")

    def told(step: int, compute_s: float, busy_s: float, work: float) -> tuple[float, ...]:
        writer.update(
            generation=Generation(1), step=Step(step), compute_s=compute_s, busy_s=busy_s, work=work
        )
        reading = live.read()
        assert reading is not None
        live.keep_pace(reading)
        return live.pace

    assert told(1, 9.0, 8.0, 7.0) == (0.0, 0.0, 0.0)
    assert told(5, 13.0, 10.0, 15.0) == (1.0, 0.5, 2.0)
    assert told(5, 13.0, 10.0, 15.0) == (1.0, 0.5, 2.0)
    assert told(6, 16.0, 12.0, 16.0) == (3.0, 2.0, 1.0)
