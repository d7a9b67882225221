"""The controller of one run: `python -m orchestrator.server RUN_FOLDER PORT`.

Takes over wherever the last one left off: replays the journal, listens, and goes on deciding.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from orchestrator.core import journal
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import EndRun
from orchestrator.core.events import ControllerStarted, Inherited
from orchestrator.faults.plan import ArmedFault, FaultPlan
from orchestrator.protocol.agent import ControllerAddress
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.app import Server
from orchestrator.server.deciding import Deciding, take_over
from orchestrator.server.journal import AlreadyRunningError, inheritance, lock
from orchestrator.server.metrics import Metrics, reading_token
from orchestrator.server.snapshots import Snapshots
from orchestrator.worlds import heap
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.clock import RunClock
from orchestrator.worlds.devices import DeviceLedger, address
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.folder import RunFolder, former_journals
from orchestrator.worlds.local import LocalWorld
from orchestrator.worlds.registrar import Registrar
from orchestrator.worlds.requests import Inbox
from orchestrator.worlds.vault import Vault
from storage.address import open_store

log = logging.getLogger("holdfast.controller")
EXIT_ALREADY_RUNNING = 4
EXIT_UNTRUSTED = 5
EXIT_NO_ROOM = 6
EXIT_FEW_DESCRIPTORS = 7
DESCRIPTORS_PER_NODE = 2
"""A connection, and a descriptor of the agent's process."""
DESCRIPTORS_BESIDE = 256
"""For the journal, the store, and connections of agents whose former ones are not closed yet."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REQUEST_LOOK_S = 0.2
SWITCH_S = 0.0002
"""While this side decides, the server gets to run this soon, not after 5 ms: it hands the
interpreter over at every system call, of which each connection takes several."""
LEDGER_S = 5.0
"""For so long a controller that takes over waits for the device ledger, and no longer."""
SETTLE_S = 1.0
"""At the end the durable tier has so long to do what was ordered, and more if agents left early."""
T = TypeVar("T", TrainingRun, FaultPlan)


def main(folder: RunFolder, port: int) -> int:
    """Run the controller until the run has ended; return the exit code.

    What can not be put on record is not carried out: with no room for it, the controller ends, and
    whoever keeps it alive starts another one, which decides from what is on record.
    """
    # Whatever a commit or a retention takes is freed in other threads than those that go on.
    heap.share_one()
    try:
        return _run(folder, port)
    except _DamagedError as error:
        log.error("%s", error)  # noqa: TRY400 - the message says it all
        return EXIT_UNTRUSTED
    except _FewDescriptorsError as error:
        log.error("%s; %s", error, error.hint)  # noqa: TRY400 - the message says it all
        return EXIT_FEW_DESCRIPTORS
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or folder.journal
        log.error("%s: %s", error.strerror, where)  # noqa: TRY400 - the message says it all
        return EXIT_NO_ROOM


def _run(folder: RunFolder, port: int) -> int:
    try:
        held = lock(folder.controller_lock)
    except AlreadyRunningError as error:
        log.error("%s; %s", error, error.hint)  # noqa: TRY400 - the message says it all
        return EXIT_ALREADY_RUNNING
    run = _decoded(folder.run_file, TrainingRun)
    _make_room_for_agents(run)
    try:
        taken = take_over(folder, run)
        controller, file = taken.controller, taken.file
        clock = RunClock(folder.clock, reached=controller.state.now)
        left = _left_by_a_former_life(folder, run, controller, clock)
    except journal.JournalError as error:
        log.error("%s; %s", error, error.hint)  # noqa: TRY400 - the message says it all
        return EXIT_UNTRUSTED
    if file.torn:
        log.warning("journal cut behind event %d: %s", file.mark().seq, file.torn)
    registrar = _registrar(run, folder, clock)
    world = _world(run, folder, clock, controller, registrar)
    world.resume(controller.state, taken.told.entries())
    deciding = Deciding(taken, world, Snapshots(folder.snapshot, run.metadata.name))
    sys.setswitchinterval(SWITCH_S)
    token = folder.token.read_text(encoding="ascii").strip()
    server = Server(world, token, metrics=Metrics(deciding.watched).text, port=port)
    _publish(folder.metrics_token, reading_token(token).encode(), mode=0o600)
    try:
        for event in left:
            deciding.handle(event)
        server.start()
        _publish_address(folder, server.url, controller)
        _drive(controller, world, deciding, registrar, folder, clock)
    finally:
        server.stop()
        file.close()
        os.close(held)
    return 0


def _left_by_a_former_life(
    folder: RunFolder, run: TrainingRun, controller: Controller, clock: RunClock
) -> list[Inherited]:
    """Return what is to be put on record before the first controller of a life takes over.

    One that dies in the middle of that has not taken over, and its successor tells all of it again.
    """
    former = former_journals(folder)
    if controller.state.incarnation > 0 or not former:
        return []
    return inheritance(former[0], run, clock())


class _FewDescriptorsError(Exception):
    """This process may not have as many files open as the run has agents."""

    hint = "Raise the hard limit: `ulimit -Hn`, LimitNOFILE= of a unit, or limits.conf."


def _make_room_for_agents(run: TrainingRun) -> None:
    """Raise the soft limit of open files to what the agents of a run need.

    Raises:
        _FewDescriptorsError: if the hard limit is below that. Some agents would be left outside,
            and the run would wait for their nodes until it is given up.
    """
    nodes = run.spec.nodes.count + run.spec.nodes.spares
    needed = nodes * DESCRIPTORS_PER_NODE + DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise _FewDescriptorsError(
            f"a run of {nodes} nodes needs {needed} open files, and the limit is {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _DamagedError(Exception):
    """A file of the run's folder is not what `holdfast run` wrote there."""


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _DamagedError(f"{error}: {path}") from error


def _registrar(run: TrainingRun, folder: RunFolder, clock: RunClock) -> Registrar:
    ledger = DeviceLedger(open_store(address(run, folder)))
    return Registrar(ledger, run.metadata.name, clock, within_s=LEDGER_S)


def _world(
    run: TrainingRun,
    folder: RunFolder,
    clock: RunClock,
    controller: Controller,
    registrar: Registrar,
) -> AgentWorld:
    faults: tuple[ArmedFault, ...] = ()
    if folder.plan_file.exists():
        faults = _decoded(folder.plan_file, FaultPlan).drawn()
    uri = run.spec.checkpoint.uri or str(folder.checkpoints)
    return LocalWorld(
        run,
        controller.state.timeouts,
        clock=clock,
        vault=Vault(run, uri, clock, limits=controller.state.timeouts),
        schedule=Schedule(faults),
        registrar=registrar,
    )


def _publish_address(folder: RunFolder, url: str, controller: Controller) -> None:
    """Let agents know where this controller listens."""
    incarnation = controller.state.incarnation + 1
    at = ControllerAddress(url=url, pid=os.getpid(), incarnation=incarnation)
    _publish(folder.address, msgspec.json.encode(at))


def _drive(
    controller: Controller,
    world: AgentWorld,
    deciding: Deciding,
    registrar: Registrar,
    folder: RunFolder,
    clock: RunClock,
) -> None:
    """Take over, and decide until the run has ended."""
    ended = controller.state.phase.final
    inbox = Inbox(folder.requests)
    asked = threading.Thread(target=_watch_for_requests, args=(folder, world, inbox), daemon=True)
    if ended:
        asked.start()
        # The predecessor decided to end the run and died before every agent knew.
        state = controller.state
        world.carry_out(
            EndRun(generation=state.generation, reason=state.end_reason, state=state.end_state)
        )
        for order in state.judging_devices.values():
            world.carry_out(order)
        expected = [node.id for node in state.nodes.values() if not node.lost]
    else:
        expected = []
        incarnation = controller.state.incarnation + 1
        deciding.handle(ControllerStarted(at=clock(), incarnation=incarnation))
        # Before any node joins: whom the ledger bars gets no seat, not even the first.
        deciding.handle(registrar.at_start())
        registrar.watch(world.know)
        # Not before: what was asked of nobody is stamped after this controller began to live.
        asked.start()
        for event in world.events():
            deciding.handle(event)
            inbox.settle(event)
    t = controller.state.timeouts
    deadline = time.monotonic() + t.abort_s + t.terminate_s + t.kill_s
    left = world.see_off(deadline - time.monotonic(), expected)
    if left:
        log.warning("did not leave in time: %s", ", ".join(left))
    if not world.settle(max(deadline - time.monotonic(), SETTLE_S)):
        log.warning("the durable tier does not answer; a commit is not done, or files are left")


def _watch_for_requests(folder: RunFolder, world: AgentWorld, inbox: Inbox) -> None:
    while not folder.stop_request.exists():
        try:
            for event in inbox.look(world.clock()):
                world.know(event)
        except Exception:
            # Whatever is wrong with a request: nobody else would hear that the run is to stop.
            log.exception("requests can not be looked at")
        time.sleep(REQUEST_LOOK_S)
    by = folder.stop_request.read_text(encoding="utf-8", errors="replace").strip()
    world.stop(by or "request")


def _publish(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file as a whole: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode)
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main(RunFolder(Path(sys.argv[1])), int(sys.argv[2])))
