"""Says to the controller what this node has to say, in an order that can be relied on.

Steps go before what follows from them. A restart from a shard whose step was never reported would
leave a hole in the history of the run: that step is not computed again.
"""

from __future__ import annotations

import os
import time

from orchestrator.agent import counts, pulse
from orchestrator.agent.account import FINISHED, Account
from orchestrator.agent.channel import Channel
from orchestrator.agent.identity import Identity
from orchestrator.agent.keeper import Keeper
from orchestrator.agent.ranks import Ranks
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import PROTOCOL_VERSION, Fact, Joined, ShardsHeld
from orchestrator.protocol.timeouts import DEFAULTS


class Voice:
    """One node's.

    Args:
        config: who it is.
        account: what it has to say of its generation.
        ranks: whose beacons tell the steps.
        keeper: what it holds.
        channel: carries it.
        identity: what the node is made of.

    Attributes:
        limits: of the run.
    """

    def __init__(
        self,
        config: AgentConfig,
        account: Account,
        ranks: Ranks,
        *,
        keeper: Keeper,
        channel: Channel,
        identity: Identity,
    ) -> None:
        self._config, self._identity = config, identity
        self._account, self._ranks, self._keeper = account, ranks, keeper
        self._channel = channel
        self.limits = DEFAULTS

    def joined(self, peer_address: str) -> Joined:
        """Return the first message of a connection: everything, but nothing ahead of its steps."""
        pulse.collect(self._account, self._ranks)
        account = self._account
        lanes = account.lanes if account.mark == FINISHED else {}
        return Joined(
            node=self._config.node,
            version=PROTOCOL_VERSION,
            incarnation=self._config.incarnation,
            pid=os.getpid(),
            peer_address=peer_address,
            generation=account.generation,
            mark=account.mark,
            ranks=account.ranks,
            holdings=account.vouched(self._keeper.holdings()),
            offered=account.offered,
            lanes=tuple(lanes[rank] for rank in account.ranks) if lanes else (),
            devices=self._identity.devices,
            devices_unknown=self._identity.unknown,
        )

    def repeat(self, steps_known: Step) -> None:
        """Say again what may have been lost with the last connection."""
        self._account.reconnected(steps_known)
        self.beat()
        # Even if `Joined` named the same: that adds, and what was dropped while nobody listened is
        # known to be gone only by this.
        self.say_held(self._account.generation)
        for fact in self._account.facts():
            self._channel.send(fact)

    def say(self, fact: Fact) -> None:
        """Say a fact now, and again on every connection while it is news."""
        self._account.keep(fact)
        pulse.collect(self._account, self._ranks)
        if self._account.owes_ahead_of(fact) and self._channel.connected:
            self.beat()
        self._channel.send(fact)

    def say_held(self, generation: Generation) -> None:
        """Say what this node's memory holds, all of it: what is not named is not there."""
        keeper = self._keeper
        self.say(
            ShardsHeld(generation=generation, holdings=keeper.holdings(), renewed=keeper.renewed())
        )

    def beat(self) -> None:
        """Say how the ranks are, with the steps that have not been said."""
        after_s = counts.stood_s(self._account, self.limits)
        beacons = {rank: live.beacon for rank, live in self._ranks.seated().items()}
        groups = counts.untold(self._account, beacons, time.monotonic_ns(), after_s)
        self._channel.send(pulse.beat(self._account, self._ranks, groups))
