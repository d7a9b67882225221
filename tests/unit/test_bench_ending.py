"""How a benchmark ends: what it makes is gone, and what it can not measure is said."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import takeover

PROGRAM = """
import sys, time
from pathlib import Path
from tests.bench import ending
with ending.new_folder(Path(sys.argv[1])) as one, ending.new_folder(Path(sys.argv[1])) as other:
    Path(one, "file").touch()
    print(other, flush=True)
    time.sleep(60)
"""


def test_a_benchmark_that_is_terminated_leaves_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 128 + signal.SIGTERM

    assert list(tmp_path.iterdir()) == []


def test_every_benchmark_that_makes_a_folder_has_it_tidied() -> None:
    others = {
        path.name
        for path in Path(__file__).parents[1].joinpath("bench").rglob("*.py")
        if path.name != "ending.py" and "tempfile" in path.read_text()
    }

    assert others == set()


def test_a_takeover_before_there_is_a_snapshot_is_not_measured_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["takeover", "--ticks", "2", "--nodes", "1"])

    with pytest.raises(SystemExit, match="2"):
        takeover.main()

    assert "no snapshot was due within" in (said := capsys.readouterr().err)
    assert said.endswith("ask for more --ticks\n")
