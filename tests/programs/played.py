"""A controller that a test plays, and real agents to play it with."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from orchestrator.agent import linux
from orchestrator.protocol.agent import AGENT_PATH, AgentConfig, ControllerAddress
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import (
    MARKS,
    PROTOCOL_VERSION,
    Announce,
    Beat,
    Begin,
    FromAgent,
    Joined,
    Reached,
    RendezvousOffered,
    StepReport,
    ToAgent,
    Welcome,
    encode,
    read_from_agent,
)
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.timeouts import Timeouts, derive
from orchestrator.worker.beacon import BeaconReader
from storage.shard import DATA_ALIGNMENT

PROGRAMS = Path(__file__).parent
TOKEN = "sesame"  # noqa: S105 - the secret of a test
WITHIN_S = 20.0
M = TypeVar("M")


def wait_for(condition: Callable[[], Any], within_s: float = WITHIN_S, what: str = "") -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what or "condition"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    vitals = linux.vitals(pid)
    return vitals is not None and vitals.state != "Z"


def slots_of(pid: int) -> list[str]:
    """Return the names of the staging slots that a process, if it is there, has mapped; ascending.

    That of a file which is removed ends with "(deleted)".
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if ".slot-" in line or "/gone-" in line}
    return sorted(path.rpartition("/")[2] for path in paths)


class Controller:
    """Accepts agents, remembers what they say and when, and sends what the test wants said.

    It announces every rendezvous that is offered, as the real one does.
    """

    def __init__(self, folder: Path, *, detect_within_s: float = 2.0) -> None:
        self.folder = folder
        self.file = folder / "controller.json"
        self.timeouts: Timeouts = derive(detect_within_s, 60.0)
        self.job: dict[str, Any] = {"steps": 1_000_000}
        self.steps_known = 0
        self.token = TOKEN
        self.heard: list[tuple[float, str, FromAgent]] = []
        self.refused: list[int] = []
        self.links: dict[str, ServerConnection] = {}
        self.joins: dict[str, int] = {}
        self._changed = threading.Condition()
        self._incarnation = 0
        self._server: Server | None = None

    def start(self) -> None:
        self._server = serve(
            self._talk,
            "127.0.0.1",
            0,
            compression=None,
            process_request=self._check,
            max_size=8 << 20,
            close_timeout=0.2,
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._incarnation += 1
        host, port = self._server.socket.getsockname()
        address = ControllerAddress(
            url=f"http://{host}:{port}", pid=os.getpid(), incarnation=self._incarnation
        )
        fresh = self.file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(address))
        fresh.replace(self.file)

    def stop(self) -> None:
        """Go away as a killed process does: every connection breaks, nobody listens."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        for link in list(self.links.values()):
            with contextlib.suppress(OSError):
                link.socket.shutdown(2)
        wait_for(lambda: not self.links)

    def send(self, node: str, order: ToAgent) -> None:
        self.links[node].send(encode(order).decode())

    def send_raw(self, node: str, text: str) -> None:
        self.links[node].send(text)

    def hear(
        self,
        kind: type[M],
        node: str = "node-0",
        *,
        since: float = 0.0,
        where: Callable[[M], bool] = lambda _: True,
        within_s: float = WITHIN_S,
    ) -> tuple[float, M]:
        """Wait for a message; return (when it came, message)."""

        def found() -> tuple[float, M] | None:
            for at, who, message in self.heard:
                if at >= since and who == node and isinstance(message, kind) and where(message):
                    return at, message
            return None

        with self._changed:
            there = self._changed.wait_for(lambda: found() is not None, within_s)
            assert there, f"no {kind.__name__} from {node}; heard {self.summary()}"
            result = found()
            assert result is not None
            return result

    def reached(self, mark: str, generation: int, node: str = "node-0") -> float:
        def fits(fact: Reached) -> bool:
            return fact.generation == generation and fact.mark >= MARKS.index(mark)

        return self.hear(Reached, node, where=fits)[0]

    def messages(self, kind: type[M], node: str = "node-0", since: float = 0.0) -> list[M]:
        return [
            m for at, who, m in self.heard if at >= since and who == node and isinstance(m, kind)
        ]

    def reports(self, node: str = "node-0", since: float = 0.0) -> list[StepReport]:
        return [r for beat in self.messages(Beat, node, since) for r in beat.reports]

    def summary(self) -> list[FromAgent]:
        return [m for _, _, m in self.heard if not isinstance(m, Beat)][-20:]

    def begin(self, generation: int, seats: list[str], **more: Any) -> float:
        """Order a generation; return when."""
        shard_of = more.pop("shard_of", tuple(range(len(seats))))
        order = Begin(
            order=f"b{generation}",
            generation=Generation(generation),
            world_size=len(seats),
            ranks=tuple(Rank(rank) for rank in range(len(seats))),
            seats=tuple(map(NodeId, seats)),
            shard_of=shard_of,
            writers=tuple(Rank(shard_of.index(shard)) for shard in sorted(set(shard_of))),
            peers=more.pop("peers", self.peers()),
            **more,
        )
        at = time.monotonic()
        for node in dict.fromkeys(seats):
            self.send(node, order)
        return at

    def peers(self) -> dict[NodeId, str]:
        known = {}
        for _, who, message in self.heard:
            if isinstance(message, Joined):
                known[NodeId(who)] = message.peer_address
        return known

    def _check(self, link: ServerConnection, request: Any) -> Any:
        right = request.headers.get("Authorization") == f"Bearer {self.token}"
        if request.path != AGENT_PATH or not right:
            self.refused.append(401)
            return link.respond(HTTPStatus.UNAUTHORIZED, "wrong token\n")
        return None

    def _talk(self, link: ServerConnection) -> None:
        node = ""
        with contextlib.suppress(ConnectionClosed):
            joined = read_from_agent(link.recv(10))
            assert isinstance(joined, Joined)
            node = joined.node
            link.send(encode(self._welcome()).decode())
            self.links[node] = link
            self._note(node, joined)
            for text in link:
                message = read_from_agent(text)
                self._note(node, message)
                if isinstance(message, RendezvousOffered):
                    self._announce(message)
        if self.links.get(node) is link:
            del self.links[node]

    def _announce(self, offer: RendezvousOffered) -> None:
        order = Announce(order="a", generation=offer.generation, address=offer.address)
        for link in list(self.links.values()):
            with contextlib.suppress(ConnectionClosed):
                link.send(encode(order).decode())

    def _note(self, node: str, message: FromAgent) -> None:
        with self._changed:
            self.heard.append((time.monotonic(), node, message))
            self._changed.notify_all()

    def _welcome(self) -> Welcome:
        return Welcome(
            run="test",
            run_id="test",
            version=PROTOCOL_VERSION,
            timeouts=self.timeouts,
            checkpoint_uri=str(self.folder / "checkpoints"),
            entrypoint="steps:main",
            job={"trainer": {"options": self.job}},
            steps_known=Step(self.steps_known),
        )


class Agent:
    """A real agent. Ends with `close`, whatever it does."""

    def __init__(self, folder: Path, memory: Path, node: str = "node-0", **more: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": str(PROGRAMS), **more.pop("environment", {})}
        self.work = folder / node
        self.memory = memory / node
        self.logs = folder / "logs"
        self.work.mkdir(exist_ok=True)
        self.log = self.work / "agent.log"
        config = AgentConfig(
            **{
                "node": NodeId(node),
                "incarnation": 1,
                "run": "test",
                "token": TOKEN,
                "controller_file": str(folder / "controller.json"),
                "entrypoint": "steps:main",
                "ranks": 2,
                "memory": str(self.memory),
                "work": str(self.work),
                "logs": str(self.logs),
                **more,
            }
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.agent"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(msgspec.json.encode(config))

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """Ranks and the warm process."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def rank_pid(self, rank: int, generation: int) -> int:
        """Return the process that took a seat, from what it printed."""
        found: list[int] = []

        def look() -> bool:
            path = self.logs / f"rank-{rank:05d}.log"
            text = path.read_text() if path.exists() else ""
            for line in text.splitlines():
                words = line.split()
                if words[:1] == ["pid"] and words[2:] == [
                    "generation",
                    str(generation),
                    "rank",
                    str(rank),
                ]:
                    found.append(int(words[1]))
            return bool(found)

        wait_for(look, what=f"rank {rank} of generation {generation}")
        return found[-1]

    def restored(self, rank: int) -> list[tuple[int, int, int]]:
        """Return (generation, step, generation that had saved it) of each restore of a rank."""
        return restores((self.logs / f"rank-{rank:05d}.log").read_text())

    def parked(self) -> int:
        """How many processes wait for a seat, by their own account."""
        waiting = 0
        for page in (self.memory / "beacons").glob("*"):
            with contextlib.suppress(FileNotFoundError, ValueError):  # just made, just removed
                reader = BeaconReader(page)
                waiting += reader.read().phase is RankPhase.WAITING
                reader.close()
        return waiting

    def terminate(self, within_s: float = 15.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def close(self) -> None:
        children = self.children() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for pid in children:
            wait_for(lambda pid=pid: not alive(pid), 10, f"process {pid} outlived its agent")


def restores(log: str) -> list[tuple[int, int, int]]:
    """Return (generation, step, generation that had saved it) of each restore in a rank's log."""
    found = re.findall(r"^restored generation (\d+) step (\d+) of (\d+)$", log, re.MULTILINE)
    return [(int(one), int(step), int(saved_by)) for one, step, saved_by in found]


def shared_folder() -> Path:
    """Return a new folder on the memory file system; remove it with `remove`."""
    return Path(tempfile.mkdtemp(prefix="holdfast-test-", dir="/dev/shm"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def flip_a_bit(memory: Path, *, rank: int) -> None:
    """Damage all that a rank has staged, in the folder of its node in shared memory."""
    for slot in memory.glob(f"rank-{rank:05d}.slot-*"):
        flip_a_bit_of(slot)


def flip_a_bit_of(shard: Path) -> None:
    """Damage the first chunk of a shard, behind its header."""
    with shard.open("r+b") as file:
        file.seek(DATA_ALIGNMENT)
        first = file.read(1)
        file.seek(DATA_ALIGNMENT)
        file.write(bytes([first[0] ^ 1]))


def newest(fact: Any, rank: int | None = None) -> int:
    """Return the last step that a fact says is held (of a rank, if one is named), 0 for none."""
    return max((h.step for h in fact.holdings if rank in (None, h.rank)), default=0)


def holder(fact: Any, rank: int, step: int) -> bool:
    return any((h.rank, h.step) == (Rank(rank), Step(step)) for h in fact.holdings)
