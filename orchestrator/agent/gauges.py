"""Has probes read this node's hardware now and then, and waits for none of them.

A driver may hang, with whoever asks it: each probe has a thread of its own, and what it has read is
taken in when it is there. A probe that does not answer, or raises, leaves the node without its
gauges, which is told; whatever happens, ranks train on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from orchestrator.agent.signals import Judge, Look, NoDevicesError, Probe
from orchestrator.agent.threads import DaemonThreads

log = logging.getLogger(__name__)
WITHIN_S = 30.0
"""A probe that takes longer is told of. A driver may take seconds to wake a GPU: an assumption."""


@dataclass(slots=True)
class _Watch:
    probe: Probe
    threads: DaemonThreads
    due_at: float = 0.0
    asked_at: float = 0.0
    answer: Future[Look] | None = None
    answered: bool = False
    """Whether anything is known of it."""
    problem: str = ""
    """Why not all that it could read is read; "" if it is."""
    lacking: str = ""
    """What is not installed here that it would read with; "" if it is."""


class Gauges:
    """One node's.

    Args:
        probes: asked in turn, each for itself.
        judge: hears what they have read.
        within_s: seconds after which a probe that has not answered is told of.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        judge: Judge,
        *,
        within_s: float = WITHIN_S,
    ) -> None:
        self._judge, self._within_s = judge, within_s
        self._watches = [_Watch(p, DaemonThreads(1, f"probe-{p.name}")) for p in probes]
        self._over: list[_Watch] = []

    @property
    def answered(self) -> bool:
        """Whether something is known of each probe: before that, silence says nothing."""
        return all(watch.answered for watch in self._watches)

    def blind(self) -> tuple[str, ...]:
        """Return why gauges that there may be are not read."""
        watches = [*self._watches, *self._over]
        return tuple(f"{w.probe.name}: {w.problem}" for w in watches if w.problem)

    def lacking(self) -> tuple[str, ...]:
        """Return what is not installed here, without which some gauges are not read."""
        return tuple(f"{w.probe.name}: {w.lacking}" for w in self._watches if w.lacking)

    def look(self, now: float) -> str:
        """Return why this node is unusable, "" if nothing new says so. Never waits."""
        why = ""
        for watch in tuple(self._watches):
            why = why or self._turn(watch, now)
        return why

    def _turn(self, watch: _Watch, now: float) -> str:
        """Take in what a probe has read, or have it read again."""
        if watch.answer is None:
            if now >= watch.due_at:
                watch.answer, watch.asked_at = watch.threads.submit(watch.probe.look), now
            return ""
        if not watch.answer.done():
            if now - watch.asked_at > self._within_s:
                watch.answered = True
                self._complain(watch, f"has not answered for {self._within_s:g} s")
            return ""
        answer, watch.answer = watch.answer, None
        watch.answered, watch.due_at = True, now + watch.probe.every_s
        try:
            look = answer.result()
        except NoDevicesError as error:
            log.info("%s: %s", watch.probe.name, error)
            self._end(watch, str(error) if error.missed else "")
            return ""
        except Exception as error:
            log.exception("probe %s is switched off", watch.probe.name)
            self._end(watch, f"switched off, it raised {type(error).__name__}: {error}")
            return ""
        self._complain(watch, look.problem)
        if look.lacking and look.lacking != watch.lacking:
            log.info("hardware: %s: %s", watch.probe.name, look.lacking)
        watch.lacking = look.lacking
        whys = [self._judge.read(reading, now) for reading in look.readings]
        return next(filter(None, whys), "")

    def _complain(self, watch: _Watch, problem: str) -> None:
        if problem and problem != watch.problem:
            log.warning("hardware: %s: %s", watch.probe.name, problem)
        watch.problem = problem

    def _end(self, watch: _Watch, problem: str) -> None:
        self._complain(watch, problem)
        self._watches.remove(watch)
        self._over.append(watch)
        watch.threads.shutdown()

    def close(self) -> None:
        """Ask nothing any more; a question that is not answered is left to its thread."""
        for watch in self._watches:
            watch.threads.shutdown()
        self._watches = []
