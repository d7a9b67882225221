"""What looks for wrong state may raise on a rank: training goes on as if nothing had looked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.process
@pytest.mark.timeout(150)
def test_a_detector_that_raises_on_one_rank_is_said_to_be_off_and_changes_no_bit(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.programs.blind"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    sighted, blind = ([json.loads(line) for line in out.splitlines()] for out, _ in said)
    # Where bits differ from one time to the next, all ranks find so.
    chance, also = sighted.pop(), blind.pop()
    assert chance == also
    assert [detector for detector, _ in chance["off"]] == ["replays", "outliers"]
    for _, reason in chance["off"]:
        assert reason.startswith("on 2 of 2 ranks the same micro-batch comes out otherwise")
    off: dict[str, Any] = {each["way"]: each["off"] for each in blind}
    assert off == {
        "sound": [],
        "watch": [["digests", "RuntimeError: no digest today"]],
        "replay": [["replays", "RuntimeError: no digest today"]],
        "samples": [
            ["replays", "OSError: no samples range(1, 2) of step 3"],
            ["readings", "OSError: no samples range(0, 2) of step 3"],
        ],
    }
    for each in (*sighted, *blind, chance):
        assert each["losses"] == sighted[0]["losses"], f"{each['way']} changes results"
        assert each["diverged_at"] == [], f"{each['way']} is taken for a wrong device"
    assert len(sighted[0]["losses"]) == 5
    assert not any(each["off"] for each in sighted)
    assert said[1][1].count("RuntimeError: no digest today") == 2, "once each, in the rank's log"
