"""How two agents show each other that they know the run's token, which itself is never sent.

    caller    PROTOCOL, and bytes drawn by chance
    server    Challenge: bytes that it drew, and its proof
    caller    its proof, and at once what it has to say

A proof is an HMAC-SHA256 under the token, of who proves it, of what both ends drew, and of the
address that was called. So what was heard once proves nothing again; what a server says is no
answer that a caller could give; and who sits at another address, that of an agent which died for
instance, can not hand on what it is told to an agent and pass for that one.

Of a stranger a server reads so many bytes and no more, and gives it no more than WITHIN_S.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets

from orchestrator.agent.frames import NONCE_BYTES, PROOF_BYTES, Challenge
from orchestrator.agent.shards import KeeperError
from orchestrator.agent.wire import Wire

PROTOCOL = b"holdfast peers 3"
"""What comes first on a connection. It changes with anything that is said after it."""
WITHIN_S = 5.0
"""Who has not shown the token by then, or not said what it began to say, is hung up on."""
_CALLER, _SERVER = b"caller", b"server"


class StrangerError(KeeperError):
    """Whoever is at the other end has not shown this run's token."""

    hint = "Agents of one run must be started with the same token and the same version."


async def greet(wire: Wire, token: str) -> None:
    """Have whoever was called show the token, then show it.

    Raises:
        StrangerError: if it does not know it, or is not who is called.
        KeeperError: if it refuses; of the class that it says.
        OSError: if the connection is lost, or it says nothing for WITHIN_S.
    """
    own = secrets.token_bytes(NONCE_BYTES)
    try:
        async with asyncio.timeout(WITHIN_S):
            await wire.write(PROTOCOL + own)
            challenge = await wire.hear(Challenge)
    except TimeoutError:
        raise TimeoutError(f"has not shown the token within {WITHIN_S:g} s") from None
    drawn = own + challenge.nonce
    if not hmac.compare_digest(challenge.proof, _proof(token, _SERVER, drawn, wire.name)):
        raise StrangerError(f"{wire.name} does not know this run's token, or has another address")
    await wire.write(_proof(token, _CALLER, drawn, wire.name))


async def admit(wire: Wire, token: str, address: str) -> None:
    """Show the token to whoever called `address`, then have it show it.

    Raises:
        StrangerError: if it does not know it, or does not speak this protocol.
        OSError: if the connection is lost.
    """
    if await wire.read(len(PROTOCOL)) != PROTOCOL:
        raise StrangerError(f"expected a caller that speaks {PROTOCOL.decode()!r}")
    theirs, own = await wire.read(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    drawn = theirs + own
    await wire.say(Challenge(own, _proof(token, _SERVER, drawn, address)))
    shown = await wire.read(PROOF_BYTES)
    if not hmac.compare_digest(shown, _proof(token, _CALLER, drawn, address)):
        raise StrangerError("token is not this run's")


def _proof(token: str, role: bytes, drawn: bytes, address: str) -> bytes:
    # All but the last have a fixed length, so that no two messages are the same bytes.
    return hmac.digest(token.encode(), PROTOCOL + role + drawn + address.encode(), "sha256")
