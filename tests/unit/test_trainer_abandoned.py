"""What belongs to worlds that were left goes when nobody else refers to it, and holds nobody up."""

import threading
import time

from trainer.abandoned import Abandoned


class Group:
    """Like a process group, its destructor waits, and lets other threads run meanwhile."""

    def __init__(self, name: str, gone: list[str], may_go: threading.Event | None = None) -> None:
        self.name, self.gone, self.may_go = name, gone, may_go

    def __del__(self) -> None:
        if self.may_go is not None:
            self.may_go.wait(30)
        self.gone.append(self.name)


def until_empty(abandoned: Abandoned) -> None:
    deadline = time.monotonic() + 30
    while len(abandoned) > 0:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nothing_goes_before_it_is_let_go_and_what_others_rest_on_goes_last() -> None:
    gone: list[str] = []
    abandoned = Abandoned()
    abandoned.add([Group("store", gone), Group("world", gone), Group("shard", gone)])
    assert (len(abandoned), gone) == (1, [])

    abandoned.let_go()
    until_empty(abandoned)

    assert gone == ["shard", "world", "store"]


def test_a_world_that_waits_holds_up_nobody_and_counts_until_it_is_gone() -> None:
    gone: list[str] = []
    may_go = threading.Event()
    abandoned = Abandoned()
    abandoned.add([Group("stuck", gone, may_go)])
    abandoned.add([Group("next", gone)])

    abandoned.let_go()
    deadline = time.monotonic() + 30
    while gone != ["next"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert gone == ["next"]
    assert len(abandoned) == 1

    may_go.set()
    until_empty(abandoned)
    assert gone == ["next", "stuck"]


def test_what_somebody_still_refers_to_is_kept_so_that_the_last_reference_is_never_theirs() -> None:
    gone: list[str] = []
    abandoned = Abandoned()
    group = Group("group", gone)
    abandoned.add([Group("store", gone), group])

    abandoned.let_go()
    assert (len(abandoned), gone) == (1, [])

    del group
    assert gone == []
    abandoned.let_go()
    until_empty(abandoned)
    assert gone == ["group", "store"]
