"""What drain and uncordon ask for, what they tell, and what they refuse."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.events import DrainCancelled, DrainRequested
from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.worlds import requests
from orchestrator.worlds.requests import Inbox, Request
from tests.conftest import Cluster
from tests.journals import holdfast, succeeded, text, write

pytestmark = pytest.mark.usefixtures("home")

DRAIN = Request(ask="drain", nodes=(NodeId("node-0"),), by="ann", reason="DIMM", within_s=60.0)
FREE = Request(ask="uncordon", nodes=(NodeId("node-0"),), by="ann")


class Live:
    """A run whose controller takes requests up, and trains on while it does."""

    def __init__(self, root: Path) -> None:
        self.cluster = Cluster()
        self.cluster.start()
        self.cluster.train(3)
        self.folder = write(self.cluster, root)
        self.asked: list[DrainRequested | DrainCancelled] = []
        self._inbox = Inbox(self.folder.requests)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._decide)
        self._thread.start()

    def _decide(self) -> None:
        while not self._over.wait(0.01):
            for event in self._inbox.look(self.cluster.after(0.1).at()):
                assert isinstance(event, DrainRequested | DrainCancelled)
                self.asked.append(event)
                self.cluster.tell(event)
                self.folder.journal.write_bytes(text(self.cluster))
                self._inbox.settle(event)
                self._train()

    def _train(self) -> None:
        cluster = self.cluster
        cluster.train(1)
        cluster.hold(cluster.state.reached_step)
        if not cluster.state.phase.final and cluster.state.phase.name != "TRAINING":
            cluster.resume()
        self.folder.journal.write_bytes(text(cluster))

    def end(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def live(home: Path) -> Iterator[Live]:
    one = Live(home / "demo")
    yield one
    one.end()


def refused(*arguments: str, code: int) -> tuple[str, str]:
    result = holdfast(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    message, hint = result.stderr.strip().rsplit("\nhint: ")
    return message, hint


def test_a_node_is_asked_for_in_the_name_of_the_user_and_told_to_be_free(live: Live) -> None:
    result = holdfast("drain", "node", "node-0", "--within", "10m", "--reason", "DIMM")

    assert result.exit_code == 0, result.output
    assert result.stdout == "node-0 is free, after 0 steps done again (inc-1: planned swap)\n"
    (event,) = live.asked
    assert isinstance(event, DrainRequested)
    assert (event.nodes, event.reason, event.within_s) == (("node-0",), "DIMM", 600.0)
    assert event.by.endswith("with `holdfast drain`")
    assert list(live.folder.requests.iterdir()) == []
    assert "Drained" in holdfast("get", "nodes").stdout
    described = holdfast("describe", "node", "node-0").stdout
    assert "Condition:       Drained" in described
    assert "cordoned, asked for by" in described
    assert "node-0 to be free within 10 min 00 s" in described
    incident = holdfast("describe", "incident").stdout
    assert "planned (nothing was paid)" in incident
    assert "planned swap: a node is to be free" in incident


def test_a_spare_is_free_at_once_and_may_be_used_again(live: Live) -> None:
    assert holdfast("drain", "node", "node/node-2").stdout == "node-2 is free\n"

    freed = holdfast("uncordon", "node", "node-2")

    assert freed.stdout == "node-2 may be used: Spare\n"
    assert [type(event) for event in live.asked] == [DrainRequested, DrainCancelled]


def test_what_was_asked_and_what_came_of_it_are_told_as_json(live: Live) -> None:
    drained = json.loads(holdfast("drain", "node", "node-0", "-o", "json").stdout)
    freed = json.loads(holdfast("uncordon", "node", "node-0", "-o", "json").stdout)

    assert [(row["node"], row["condition"], row["incident"]) for row in drained] == [
        ("node-0", "Drained", "inc-1")
    ]
    assert [(row["condition"], row["why"]) for row in freed] == [("Spare", "")]
    assert live.cluster.state.drains == {}


def test_a_node_without_a_spare_is_waited_for_no_longer_than_asked_and_the_request_stands(
    live: Live,
) -> None:
    holdfast("drain", "node", "node-2")

    message, hint = refused("drain", "node", "node-0", "--wait", "500ms", code=4)

    assert "not free 500 ms after it was asked for: node-0" in message
    assert "waiting for a spare: 0 free" in message
    assert "`holdfast uncordon node node-0 --run demo`" in hint
    assert set(live.cluster.state.drains) == {"node-0", "node-2"}
    assert "Draining" in holdfast("get", "nodes").stdout


def test_where_nobody_decides_the_request_is_taken_back(home: Path) -> None:
    cluster = Cluster()
    cluster.start()
    folder = write(cluster, home / "demo")

    message, hint = refused("drain", "node", "node-0", "--wait", "300ms", code=1)

    assert message.startswith("no controller of demo has taken the request up")
    assert "holdfast run" in hint
    assert list(folder.requests.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("drain", "rank", "0"), "no kind 'rank'", "there are: node"),
        (("drain", "node", "nod-1"), "no node 'nod-1': demo", "`node-1`"),
        (("uncordon", "node", "x"), "no node 'x': demo", "node-0, node-1"),
        (("drain", "node", "node-0", "--within", "10"), "--within: duration is '10'", "`10m`"),
        (("drain", "node", "node-0", "--wait", "0s"), "--wait is 0s", "`10m`"),
        (("drain", "node", "node-0", "--reason", "a\nb"), "--reason has 3 characters", "short"),
        (("drain", "node", "node-0", "--reason", "x" * 201), "at most 200", "short"),
        (("drain", "node", "node-0", "--run", "dmeo"), "no run 'dmeo'", "`demo`"),
    ],
)
@pytest.mark.usefixtures("live")
def test_what_makes_no_sense_is_refused_before_anything_is_asked(
    arguments: tuple[str, ...], message: str, hint: str
) -> None:
    found = refused(*arguments, code=2)

    assert message in found[0]
    assert hint in found[1]


def test_nodes_of_a_run_that_has_ended_are_free(home: Path) -> None:
    write(succeeded(), home / "short")

    message, hint = refused("drain", "node", "node-0", code=1)

    assert message.startswith("short has ended: Succeeded")
    assert hint == "its nodes are free"


# The requests themselves ----------------------------------------------------------------------


def test_requests_are_taken_up_once_and_in_order_and_are_gone_when_on_record(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "requests"
    inbox = Inbox(folder)
    assert inbox.look(Seconds(0.0)) == []
    for request in (DRAIN, FREE):
        requests.leave(folder, request)

    first, second = inbox.look(Seconds(5.0))

    assert isinstance(first, DrainRequested)
    assert 0.0 <= first.late_s < 5.0
    assert first == DrainRequested(
        at=Seconds(5.0),
        nodes=(NodeId("node-0"),),
        by="ann",
        reason="DIMM",
        within_s=60.0,
        late_s=first.late_s,
        request=first.request,
    )
    assert second == DrainCancelled(at=Seconds(5.0), nodes=(NodeId("node-0"),), by="ann")
    assert inbox.look(Seconds(6.0)) == []
    inbox.settle(first)
    assert len(list(folder.iterdir())) == 1
    # A successor takes up what was not put on record, once more.
    assert Inbox(folder).look(Seconds(7.0)) == [
        DrainCancelled(at=Seconds(7.0), nodes=(NodeId("node-0"),), by="ann")
    ]


@pytest.mark.parametrize("junk", [b"", b"{}", b"\xff\xfe", b'{"ask": "explode", "nodes": []}'])
def test_what_is_no_request_is_removed_and_said_to_be_none(
    junk: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "requests"
    requests.leave(folder, DRAIN)
    (folder / "1.json").write_bytes(junk)
    (folder / "2.json").mkdir()
    inbox = Inbox(folder)

    events = inbox.look(Seconds(0.0)) + inbox.look(Seconds(1.0))

    assert len(events) == 1
    assert "no request, removed" in caplog.text
    assert not (folder / "1.json").exists()
    assert caplog.text.count("a request can not be read: Is a directory") == 1


def test_a_request_that_is_being_written_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".half.json").write_bytes(b"{")

    assert Inbox(tmp_path).look(Seconds(0.0)) == []
    assert (tmp_path / ".half.json").exists()


def test_a_request_that_is_claimed_can_not_be_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "requests"
    left = requests.leave(folder, DRAIN)

    assert len(Inbox(folder).look(Seconds(0.0))) == 1

    assert requests.standing(left) == "claimed"
    assert not requests.take_back(left)


def test_a_request_that_outlives_a_controller_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "requests"
    requests.leave(folder, DRAIN)

    (first,) = Inbox(folder).look(Seconds(1.0))
    (again,) = Inbox(folder).look(Seconds(2.0))

    assert isinstance(first, DrainRequested)
    assert isinstance(again, DrainRequested)
    assert first.request == again.request != ""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_request_in_a_folder_of_somebody_else_is_not_acted_on() -> None:
    program = (
        "import os, sys; from pathlib import Path; from orchestrator.worlds.requests import Inbox;"
        "inbox = Inbox(Path(sys.argv[1])); os.setgid(65534); os.setuid(65534);"
        "print(inbox.look(0.0), inbox.look(1.0))"
    )
    # Not in the folder of the tests, into which nobody else may look.
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        folder = Path(root) / "requests"
        requests.leave(folder, DRAIN)

        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip

        assert done.stdout.strip() == "[] []"
        assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_a_request_that_the_controller_does_not_understand_is_said_to_be_refused(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer(folder: Path, request: Request) -> Path:
        del request
        folder.mkdir(exist_ok=True)
        file = folder / "1.json"
        file.write_bytes(b'{"ask": "explode", "nodes": []}')
        return file

    monkeypatch.setattr(requests, "leave", newer)

    message, hint = refused("uncordon", "node", "node-0", code=1)

    assert message == "the controller of demo does not understand the request"
    assert "another version" in hint
    assert list(live.folder.requests.iterdir()) == []
