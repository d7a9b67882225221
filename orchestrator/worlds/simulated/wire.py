"""What becomes of single messages of agents: they may be late, be said twice, or be lost.

A connection keeps what is said on it in order, and loses nothing before it breaks. Whoever relies
on more than a fact says of itself is wrong the day that one is carried by something else, or that
an agent says two things from two threads: here a message is overtaken by those after it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from orchestrator.protocol.ids import Seconds
from orchestrator.worlds.simulated.agenda import Act, Agenda


class Wire:
    """Carries messages, some of them badly.

    Args:
        agenda: what happens when.
        chance: every draw comes from it.
        rate: share of the messages with which something is wrong.
        late_s: how late these are, on average.
        until: nothing is wrong with what is said after this moment.
    """

    def __init__(
        self,
        agenda: Agenda,
        chance: np.random.Generator,
        rate: float,
        late_s: float,
        until: Seconds,
    ) -> None:
        self._agenda, self._chance = agenda, chance
        self._rate, self._late_s, self._until = rate, late_s, until

    def carry(self, deliver: Act, lasts: Callable[[], bool], sever: Act) -> None:
        """Deliver a message, now or later, once or twice; or lose it, and its connection with it.

        Args:
            deliver: has the controller know it.
            lasts: whether the connection on which it was said is still there.
            sever: breaks that connection. Something that loses messages does not keep it for long,
                but what is said until then arrives.
        """
        if self._agenda.now >= self._until or self._chance.random() >= self._rate:
            deliver()
            return
        fate = int(self._chance.integers(3))
        if fate == 0:
            deliver()
        late_s = float(self._chance.exponential(self._late_s))
        then = sever if fate == 1 else deliver
        self._agenda.after(late_s, lambda: then() if lasts() else None)
