"""What this node's hardware says of itself, whoever reads it, told to the controller."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as LateError
from pathlib import Path

from orchestrator.agent.devices import Devices, Gpu, Gpus, own_devices
from orchestrator.agent.gauges import Gauges
from orchestrator.agent.identity import Identity, blamed
from orchestrator.agent.kernel import KernelLog
from orchestrator.agent.nvml import Nvml
from orchestrator.agent.signals import (
    BadTableError,
    Judge,
    NoDevicesError,
    Probe,
    Signal,
    overridden,
    read_table,
)
from orchestrator.agent.smart import Smart
from orchestrator.agent.sysfs import Sysfs
from orchestrator.agent.threads import DaemonThreads
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.messages import Fact, NodeAiling, NodeUnusable, Symptom

log = logging.getLogger(__name__)
SYMPTOMS_MAX = 64
"""That are told; a node of which more holds is told by these."""
MEET_S = 5.0
"""How long a driver may take to say which GPUs there are before the agent goes on without."""


def meet(within_s: float = MEET_S) -> tuple[Gpu, ...]:
    """Return the GPUs of this machine, as far as the driver's library tells of them in time."""
    threads = DaemonThreads(1, "meet-gpus")
    try:
        return threads.submit(Nvml().boards).result(timeout=within_s)
    except NoDevicesError:
        return ()
    except LateError:
        log.warning("the driver has not said which GPUs there are for %g s", within_s)
        return ()
    except Exception as error:  # noqa: BLE001 - of a library; whatever it is, ranks are to be started
        log.warning("the driver does not say which GPUs there are: %s", error)
        return ()
    finally:
        threads.shutdown()


class Hardware:
    """One node's.

    Args:
        config: of its agent.
        gpus: of its ranks.
        identity: what it is made of.
        say: says a fact to the controller, again on every connection.
        probes: what reads the hardware beside the kernel's log; None for all there are.
    """

    def __init__(
        self,
        config: AgentConfig,
        gpus: Gpus,
        identity: Identity,
        say: Callable[[Fact], None],
        probes: Sequence[Probe] | None = None,
    ) -> None:
        self._gpus, self._identity, self._say = gpus, identity, say
        devices = own_devices(gpus, (config.work, config.logs))
        table, self._untabled = _table(config.signals)
        self._judge = Judge(table, devices, shared=config.kernel_shared)
        self._kernel = KernelLog(Path(config.kernel_log), self._judge)
        if probes is None:
            probes = _probes(config, gpus, devices, listens=bool(self._kernel.degraded))
        self._gauges = Gauges(probes, self._judge)
        # What nodes that share a kernel are told of it is noted, and no more.
        self._tells = not config.kernel_shared
        # An agent before this one may have told of something.
        self._told = NodeAiling() if config.incarnation == 1 else None
        self._off = False

    def look(self, now: float) -> None:
        """Say what is new. Never waits, and never raises: the node has to beat, or it is lost."""
        if self._off:
            return
        try:
            self._look(now)
        except Exception as error:
            log.exception("what the hardware says is not heard any more")
            self._off = True
            self.close()
            if self._tells:
                # What held then may hold still: nobody looks any more whether it is over.
                held = self._told.symptoms if self._told is not None else ()
                why = f"switched off, it raised {type(error).__name__}: {error}"
                self._say(NodeAiling(symptoms=held, unread=(f"hardware: {why}",)))

    def _look(self, now: float) -> None:
        for why in filter(None, (self._kernel.look(), self._gauges.look(now))):
            log.error("unusable: %s", why)
            serial = blamed(self._identity, self._gpus, *self._judge.blamed[why])
            self._say(NodeUnusable(reason=why, serial=serial))
            self._gauges.close()
        if self._tells and (self._told is not None or self._gauges.answered):
            self._tell(now)

    def _tell(self, now: float) -> None:
        symptoms = tuple(
            Symptom(
                name=symptom.name,
                device=symptom.device,
                serial=blamed(self._identity, self._gpus, symptom.own, symptom.device),
                drain=symptom.action == "drain",
                words=symptom.words,
            )
            for symptom in self._judge.symptoms(now)[:SYMPTOMS_MAX]
        )
        unread = (*self._untabled, *self._gauges.blind())
        if self._kernel.degraded:
            unread = (f"kernel's log: {self._kernel.degraded}", *unread)
        ailing = NodeAiling(symptoms=symptoms, unread=unread, lacking=self._gauges.lacking())
        if ailing != self._told:
            self._told = ailing
            self._say(ailing)

    def close(self) -> None:
        """Read nothing any more."""
        self._kernel.close()
        self._gauges.close()


def _table(file: str) -> tuple[tuple[Signal, ...], tuple[str, ...]]:
    """Return the table, with entries of a file in place of ours, and why not if they are not."""
    ours = read_table()
    if not file:
        return ours, ()
    try:
        return overridden(ours, read_table(Path(file))), ()
    except (BadTableError, OSError) as error:
        # The run was started with it, so it was one then. Ours is better than none.
        log.error("the table of signals is ours: %s", error)  # noqa: TRY400 - names the file
        return ours, (f"table of signals: {error}",)


def _probes(config: AgentConfig, gpus: Gpus, devices: Devices, *, listens: bool) -> list[Probe]:
    expected = len(gpus.own) or bool(gpus.problem)
    nvml = Nvml(events=listens, expected=expected)
    if config.kernel_shared:
        return [nvml] if expected else []
    return [nvml, Sysfs(devices.disks), Smart(devices.disks)]
