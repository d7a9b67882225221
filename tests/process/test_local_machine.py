"""What the machine of a local run does about agents that end, and about what is not its own."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.core.events import NodeLost
from orchestrator.protocol.ids import Generation, NodeId, Seconds
from orchestrator.protocol.messages import PROTOCOL_VERSION, Joined
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import derive
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.local import LocalWorld
from orchestrator.worlds.machine import RESTARTS_MAX, Machine
from orchestrator.worlds.memory import memory_of
from orchestrator.worlds.vault import Vault
from tests.runs import REPOSITORY, Job, steps_job

pytestmark = pytest.mark.process

NODES = ("node-0", "node-1", "node-2")
KILL_AGENT = {"when": {"step": 22}, "fault": "kill-agent", "node": "node-0"}
MANY = 1100
"""More descriptors than select() knows."""

Make = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Make]:
    made: list[Job] = []

    def make(
        *faults: dict[str, Any],
        options: dict[str, Any] | None = None,
        root: str = "job",
        **changes: Any,
    ) -> Job:
        if options:
            changes["trainer__options"] = steps_job()["spec"]["trainer"]["options"] | options
        made.append(Job(tmp_path / root, steps_job(**changes), list(faults)))
        # The mark of a folder that a run had before.
        made[-1].folder.nodes.mkdir(parents=True)
        made[-1].folder.supervisor_lock.touch()
        return made[-1]

    yield make
    for one in made:
        one.close()
        # Of a command that was killed, if the test failed before the next one cleared up.
        shutil.rmtree(memory_of(one.folder), ignore_errors=True)


def born_file(one: Job, node: str) -> Path:
    (one.folder.nodes / node).mkdir(exist_ok=True)
    return one.folder.nodes / node / "born.json"


def born(one: Job, node: str) -> dict[str, int]:
    return msgspec.json.decode(born_file(one, node).read_bytes(), type=dict[str, int])


def agents(one: Job) -> set[int]:
    return {pid for pid, command in one.processes() if "-m orchestrator.agent " in command}


def told(one: Job) -> str:
    return (one.folder.logs / "supervisor.log").read_text(encoding="utf-8")


def until(true: Callable[[], bool], one: Job, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, one.output()
        time.sleep(0.02)


def test_nodes_of_one_machine_are_told_that_they_share_its_kernel(job: Make) -> None:
    run = msgspec.convert(steps_job(), TrainingRun)
    machine = Machine(run, job().folder, "token", derive(10.0, 600.0))

    assert [machine.config_of(NodeId(node), 1).kernel_shared for node in NODES] == [True] * 3


# Agents that end ----------------------------------------------------------------------------------


def test_what_ranks_of_a_killed_agent_had_started_ends_with_the_run_too(job: Make) -> None:
    one = job(KILL_AGENT, options={"spawn": True})

    code, report = one.conduct()

    assert code == 0, report.reason
    assert [incident.kind for incident in report.incidents] == ["node-lost"]
    # Each rank had started one that naps for a minute, and nobody but the agent to reap it.
    assert one.output().count("Traceback") == 0
    assert one.leftovers() == []


def test_an_agent_of_a_folder_that_saw_many_lives_is_started_again_like_any_other(
    job: Make,
) -> None:
    one = job(KILL_AGENT, nodes__spares=0, recovery__spareWait="5s")
    before = {"incarnation": 10 * RESTARTS_MAX, "pid": 0, "ticks": -1}
    born_file(one, "node-0").write_text(json.dumps(before))
    born_file(one, "node-1").write_bytes(b'{"incarnation":\xff\xfe')

    code, report = one.conduct()

    assert code == 0, report.reason
    assert born(one, "node-0")["incarnation"] == 10 * RESTARTS_MAX + 2
    assert born(one, "node-1")["incarnation"] == 1
    assert one.leftovers() == []


def test_agents_that_were_seen_off_are_not_started_again(job: Make) -> None:
    one = job(options={"steps": 20}, trainer__steps=20)

    code, _ = one.conduct()

    assert code == 0
    assert [born(one, node)["incarnation"] for node in NODES] == [1, 1, 1]
    assert "started again" not in told(one)


def test_an_agent_that_somebody_ends_in_order_is_started_again(job: Make) -> None:
    one = job(options={"steps": 200}, trainer__steps=200)
    one.start()
    until(one.folder.rank_log(0).exists, one)

    os.kill(born(one, "node-2")["pid"], signal.SIGTERM)

    until(lambda: born(one, "node-2")["incarnation"] == 2, one)
    assert one.finish() == 0
    assert "agent of node-2 ended with 0" in told(one)


def test_an_agent_that_fails_again_and_again_is_left_alone_and_the_run_goes_on(job: Make) -> None:
    one = job(options={"steps": 200}, trainer__steps=200)
    one.start()
    until(born_file(one, "node-2").exists, one)
    killed: set[int] = set()

    def left() -> bool:
        pid = born(one, "node-2")["pid"]
        if pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return "node-2 is left alone" in told(one)

    until(left, one)

    assert RESTARTS_MAX < len(killed) < RESTARTS_MAX + 4
    assert one.finish() == 0, one.output()
    assert one.leftovers() == []


def test_an_agent_that_a_full_disk_keeps_from_starting_is_started_when_there_is_room(
    job: Make,
) -> None:
    one = job(options={"steps": 400}, trainer__steps=400)
    one.start()
    until(one.folder.rank_log(0).exists, one)
    first = born(one, "node-2")
    pid = one.started.pid  # type: ignore[union-attr]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, -1))  # as good as full, for this process

    os.kill(first["pid"], signal.SIGKILL)
    time.sleep(2.0)
    assert one.started.poll() is None, one.output()  # type: ignore[union-attr]
    assert born(one, "node-2") == first
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))

    until(lambda: born(one, "node-2")["incarnation"] == 2, one)
    assert one.finish() == 0, one.output()
    assert [step for step, _ in one.report().losses] == list(range(1, 401))
    assert one.leftovers() == []


def test_no_agent_lives_that_a_killed_command_had_no_time_to_write_down(job: Make) -> None:
    one = job()
    pipe = born_file(one, "node-1").with_name(".born.json")
    os.mkfifo(pipe)  # which nobody reads: the command waits here
    one.start()
    log = one.folder.nodes / "node-1" / "agent.log"
    until(log.exists, one)
    time.sleep(0.5)
    one.started.kill()  # type: ignore[union-attr]
    one.finish()

    # The agent of node-0 is on record, for the next command to end.
    until(lambda: agents(one) == {born(one, "node-0")["pid"]}, one, within_s=10)
    assert "standard input is no agent config" in log.read_text()
    pipe.unlink()
    code, report = one.conduct()

    assert code == 0, report.reason
    assert one.leftovers() == []


# What is not its own ------------------------------------------------------------------------------


def test_children_that_the_command_did_not_start_are_left_alone(job: Make) -> None:
    one = job(KILL_AGENT)
    script = f'sleep 120 & echo $! > {one.root}/bystander; exec "$@"'
    one.start(before=("bash", "-c", script, "bash"))

    code = one.finish()

    bystander = Path("/proc") / (one.root / "bystander").read_text().strip()
    assert (bystander / "comm").read_text() == "sleep\n"
    os.kill(int(bystander.name), signal.SIGKILL)
    assert code == 0, one.output()
    assert "agent of node-0 ended with -9" in told(one)
    assert one.leftovers() == []


def test_modules_where_the_command_is_started_stand_in_for_none_of_ours_and_may_be_the_trainer(
    job: Make,
) -> None:
    one = job(options={"steps": 20}, trainer__steps=20, trainer__entrypoint="mine:main")
    one.cwd = one.root / "project"
    for name in ("orchestrator", "storage", "trainer", "msgspec"):
        (one.cwd / name).mkdir(parents=True)
        (one.cwd / name / "__init__.py").write_text("raise ImportError('not ours')")
    shutil.copy(REPOSITORY / "tests/programs/steps.py", one.cwd / "mine.py")

    code, report = one.conduct()

    assert code == 0, report.reason
    assert report.final_step == 20


@pytest.mark.parametrize(
    "whose",
    [
        "a link",
        "a file",
        pytest.param(
            "somebody else's",
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away"),
        ),
    ],
)
def test_memory_that_others_can_replace_is_refused_and_left_as_it_is(job: Make, whose: str) -> None:
    one = job()
    memory = memory_of(one.folder)
    there = one.root / "there"
    there.mkdir()
    try:
        match whose:
            case "a link":
                memory.symlink_to(there)
            case "a file":
                memory.touch()
            case _:
                memory.mkdir()
                os.chown(memory, 65534, 65534)
        found = memory.lstat()

        one.start()
        code = one.finish()

        assert code == 1
        assert f"expected a folder of user {os.getuid()}: {memory}\nhint: " in one.output()
        assert "Traceback" not in one.output()
        assert memory.lstat() == found
        assert list(there.iterdir()) == []
        assert one.processes() == []
    finally:
        if memory.is_dir() and not memory.is_symlink():
            memory.rmdir()
        else:
            memory.unlink(missing_ok=True)


def test_memory_of_a_run_that_was_killed_and_removed_is_freed_by_the_next_run(job: Make) -> None:
    dead, alive, short = (job(root=name) for name in ("dead", "alive", "short"))
    for one in (dead, alive):
        one.run["spec"]["trainer"]["steps"] = one.run["spec"]["trainer"]["options"]["steps"] = 9999
        one.start()
    for one in (dead, alive):
        until(
            lambda one=one: len(agents(one)) == len(NODES) and one.folder.rank_log(3).exists(), one
        )
        # Of the one run nobody lives, of the other nobody but its agents and their ranks.
        one.started.kill()  # type: ignore[union-attr]
        one.finish()
    dead.close()
    shutil.rmtree(dead.folder.root)

    code, report = short.conduct()

    assert code == 0, report.reason
    assert not memory_of(dead.folder).exists()
    assert len(list(memory_of(alive.folder).iterdir())) == len(NODES)
    assert agents(alive)


# More descriptors than select() knows -------------------------------------------------------------


def test_a_command_that_was_given_a_thousand_descriptors_runs_all_the_same(job: Make) -> None:
    one = job(options={"steps": 20}, trainer__steps=20)
    opened = f'ulimit -n {MANY + 200}; for n in {{3..{MANY}}}; do eval "exec $n</dev/null"; done; '
    one.start(before=("bash", "-c", opened + 'exec "$@"', "bash"))

    assert one.finish() == 0, one.output()
    assert one.leftovers() == []


class _Link:
    """A connection on which nobody listens."""

    def send(self, data: bytes) -> None: ...

    def close(self, reason: str) -> None: ...


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY + 200), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(MANY)]
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_the_end_of_an_agent_is_seen_behind_a_thousand_descriptors(tmp_path: Path) -> None:
    run, began = msgspec.convert(steps_job(), TrainingRun), time.monotonic()

    def clock() -> Seconds:
        return Seconds(time.monotonic() - began)

    limits = derive(2.0, 60.0)
    vault = Vault(run, str(tmp_path), clock, limits=limits)
    world = LocalWorld(run, limits, clock=clock, vault=vault, schedule=Schedule(()))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as agent:
        joined = Joined(
            node=NodeId("node-0"),
            version=PROTOCOL_VERSION,
            incarnation=1,
            pid=agent.pid,
            peer_address="127.0.0.1:1",
            generation=Generation(0),
            mark=0,
        )
        world.take(_Link(), joined)
        events = itertools.takewhile(lambda _: clock() < 20, world.events())
        next(e for e in events if not isinstance(e, NodeLost))
        agent.kill()

        lost = next(event for event in events if isinstance(event, NodeLost))

    assert lost.evidence == f"agent of node-0 (process {agent.pid}) ended"


def test_a_run_that_nobody_looks_after_is_stopped_by_ending_its_agents(job: Make) -> None:
    one = job(options={"steps": 3000}, trainer__steps=3000)
    one.start("--quiet")
    until(one.folder.rank_log(3).exists, one)
    for pid in (one.started.pid, controller_of(one)):  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
    one.finish()
    trains_on = agents(one)
    assert len(trains_on) == len(NODES)
    # A number that has been given to another process is left alone.
    other = born(one, "node-2") | {"pid": os.getpid()}
    spare = born(one, "node-2")["pid"]
    born_file(one, "node-2").write_text(json.dumps(other))

    done = holdfast_stop(one)

    assert done.returncode == 0, done.stderr
    assert "no controller is running: steps" in done.stdout
    assert "ended the agents that trained on: node-0 (process " in done.stdout
    assert "node-2" not in done.stdout
    assert agents(one) == {spare}
    os.kill(spare, signal.SIGTERM)
    until(lambda: not one.processes(), one)
    again = holdfast_stop(one)
    assert again.returncode == 1
    assert "there is nothing to stop" in again.stderr
    assert one.leftovers() == []
    assert not one.folder.stop_request.exists()


def controller_of(one: Job) -> int:
    (pid,) = (pid for pid, command in one.processes() if "-m orchestrator.server " in command)
    return pid


def holdfast_stop(one: Job) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("holdfast")), "stop", str(one.folder.root)]
    return subprocess.run(
        [*command, "--wait", "1s"], capture_output=True, text=True, timeout=60, check=False
    )
