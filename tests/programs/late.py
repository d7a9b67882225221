"""An entrypoint whose processes are slow to come to life. No torch."""

import os
import time

os.register_at_fork(after_in_child=lambda: time.sleep(0.3))


def sleep() -> int:
    time.sleep(60)
    return 0
