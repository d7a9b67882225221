"""`holdfast checkpoint` in a process of its own, in front of a terminal, ended by an interrupt."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage.local import LocalStore
from tests.checkpoints import brought_in
from tests.journals import holdfast

# Whoever runs the tests in the background has them ignore interrupts, and so their children.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from storage.local import LocalStore
operation, end = sys.argv.pop(1), sys.argv.pop(1)
plain = getattr(LocalStore, operation)
def slow(self, key, *rest):
    if key.endswith(end):
        os.write(1, f"at {key}\\n".encode())  # a bar takes what is printed for its own
        time.sleep(60)
    return plain(self, key, *rest)
setattr(LocalStore, operation, slow)
from orchestrator.cli.main import main
main()
"""
pytestmark = pytest.mark.process
SHOW_CURSOR = b"\x1b[?25h"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "tier")
    for step in (10, 20):
        brought_in(store, step)
    return store


def interrupted(operation: str, end: str, *command: str) -> tuple[int, str, bytes]:
    """Interrupt a command in an operation on a key; return its code, what it said, and drew."""
    master, slave = pty.openpty()
    arguments = [sys.executable, "-c", PROGRAM, operation, end, "checkpoint", *command]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=slave, env=environment) as one:
        os.close(slave)
        drawn: list[bytes] = []
        # All the while: who draws on a terminal that nobody looks at waits for ever.
        looking = threading.Thread(target=_look, args=(master, drawn))
        looking.start()
        try:
            assert one.stdout is not None
            first = one.stdout.readline()
            one.send_signal(signal.SIGINT)
            out, _ = one.communicate(timeout=30)
        finally:
            one.kill()
            looking.join()
    os.close(master)
    return one.returncode, (first + out).decode(), b"".join(drawn)


def _look(master: int, drawn: list[bytes]) -> None:
    # A terminal to which nobody writes any more is at its end with an error.
    with contextlib.suppress(OSError):
        while piece := os.read(master, 65536):
            drawn.append(piece)


@pytest.mark.parametrize("command", [("verify", "--all"), ("scrub",)])
def test_reading_that_is_interrupted_leaves_the_store_and_the_terminal_as_they_were(
    store: LocalStore, command: tuple[str, ...]
) -> None:
    before = store.keys()
    name, *options = command

    code, said, drawn = interrupted("get", "s1.st", name, str(store.root), *options)

    assert code == 130
    assert said.splitlines()[0].startswith("at gen/")
    assert not [line for line in said.splitlines() if not line.startswith("at ")]
    assert store.keys() == before
    assert list(store.root.rglob(".tmp-*")) == []
    assert b"step 20" in drawn or b"scrubbing" in drawn
    assert drawn.rindex(SHOW_CURSOR) > drawn.rindex(b"\x1b[?25l")
    assert b"Traceback" not in drawn


def test_an_import_that_is_interrupted_takes_back_what_it_wrote(
    store: LocalStore, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", store.keys()
    assert holdfast("checkpoint", "export", str(store.root), "--to", str(out)).exit_code == 0
    options = ("--step", "30", "--run", "run", "--max-shard", "64B")

    code, said, drawn = interrupted("put", "s1.st", "import", str(out), str(store.root), *options)

    assert code == 130
    assert said.startswith("at gen/")
    assert store.keys() == before
    assert list(store.root.rglob(".tmp-*")) == []
    assert b"stays" not in drawn
    assert b"Traceback" not in drawn
    again = holdfast("checkpoint", "import", str(out), str(store.root), *options)
    assert again.exit_code == 0, again.output
