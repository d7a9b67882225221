"""What a process costs that has rehearsed and stands by."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process
CODE = """
from pathlib import Path
import trainer.train as train
train.warm_up()
train.rehearse()
for task in sorted(Path("/proc/self/task").iterdir()):
    print((task / "comm").read_text().strip())
"""


def test_a_process_that_has_rehearsed_keeps_no_thread_that_wakes_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True
    )

    threads = done.stdout.split()
    assert threads
    # Of a world that is not let go, gloo's thread looks a hundred times a second for news.
    assert [name for name in threads if "gloo" in name] == []
