"""Entrypoints for the warm process, as a trainer would have them. No torch."""

import gc
import os
import signal
import subprocess
import sys
import time

warmed = []
imported = gc.isenabled()


def warm_up() -> None:
    warmed.append(os.getpid())


def say() -> int:
    """Print what a test wants to know of a rank, and end."""
    print(f"warmed={warmed[0] != os.getpid()} fd={os.environ['CONTROL']} x={os.environ['X']}")
    print(f"collected, imported: {imported} and then: {gc.isenabled()}")
    return 7


def sleep() -> int:
    time.sleep(60)
    return 0


def stubborn() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("ready", flush=True)
    return sleep()


def crash() -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return sleep()


def fail() -> int:
    raise ValueError("of its own making")
