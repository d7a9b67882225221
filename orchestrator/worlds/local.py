"""One machine as a cluster, as its controller sees it; what starts its agents is `Machine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.protocol.messages import Joined
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.faults import Schedule
from orchestrator.worlds.registrar import Registrar
from orchestrator.worlds.vault import Vault
from orchestrator.worlds.watching import Watch


class LocalWorld(AgentWorld):
    """Agents on this machine: the kernel says at once when one of them ends."""

    def __init__(
        self,
        run: TrainingRun,
        timeouts: Timeouts,
        *,
        clock: Callable[[], Seconds],
        vault: Vault,
        schedule: Schedule,
        registrar: Registrar | None = None,
    ) -> None:
        super().__init__(
            run, timeouts, clock=clock, vault=vault, schedule=schedule, registrar=registrar
        )
        self._pids: dict[NodeId, int] = {}
        self._processes = Watch()

    def _watch(self, joined: Joined) -> None:
        """Watch the agent's process; a closed connection alone says nothing about it."""
        if self._pids.get(joined.node) == joined.pid:
            return  # it only connected again
        self._pids[joined.node] = joined.pid
        try:
            self._processes.until_end(joined.pid, partial(self._ended, joined.node, joined.pid))
        except ProcessLookupError:
            self.lose(joined.node, f"agent of {joined.node} (process {joined.pid}) is gone")

    def _ended(self, node: NodeId, pid: int) -> None:
        if self._pids.get(node) == pid:
            self.lose(node, f"agent of {node} (process {pid}) ended")
