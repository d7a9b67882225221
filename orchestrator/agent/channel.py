"""The agent's connection to its controller: calls out, comes back, and starts every time with all.

A message that was queued when a connection broke is gone; what must not be lost is said again by
`Joined` and the account behind it. So nothing here is kept beyond its connection, and a queue that
is full is a broken connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec
import numpy as np
import xxhash
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from orchestrator.protocol.agent import AGENT_PATH, AgentConfig, ControllerAddress
from orchestrator.protocol.messages import (
    MESSAGE_MAX_BYTES,
    PROTOCOL_VERSION,
    FromAgent,
    Joined,
    ToAgent,
    Welcome,
    encode,
    read_to_agent,
)

log = logging.getLogger(__name__)

OUTGOING_MAX = 1024
"""Messages that may wait for a controller that does not read; then the connection is dropped."""
OPEN_WITHIN_S = 5.0
WELCOME_WITHIN_S = 10.0
PAUSE_MIN_S = 0.02
PAUSE_MAX_S = 1.0
"""Longest pause between two attempts until a controller has said another (reconnect_s)."""
_LOOK_S = 0.02
"""While it waits, an agent looks this often whether there is a new controller."""
_ADDRESS_MAX_BYTES = 1 << 16


class RefusedError(Exception):
    """The controller does not want this agent, and would not at the next attempt either."""

    hint = "Is the token in the agent's config the one of this run?"


class _DropError(Exception):
    """This connection is of no use any more; another one may be."""


class Channel:
    """The connection, or the attempts to have one.

    Args:
        config: whom to call, and as whom.
        joined: returns the first message of a connection.
        welcomed: called with the controller's answer to that.
        obey: called with every order.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        joined: Callable[[], Joined],
        welcomed: Callable[[Welcome], None],
        obey: Callable[[ToAgent], None],
    ) -> None:
        self._config = config
        self._joined, self._welcomed, self._obey = joined, welcomed, obey
        self._outgoing: asyncio.Queue[str] = asyncio.Queue(OUTGOING_MAX)
        self._socket: ClientConnection | None = None
        self._reachable = asyncio.Event()
        self._reachable.set()
        # Every node its own sequence: a thousand agents must not come back at one moment.
        seed = xxhash.xxh3_64_intdigest(f"{config.run}/{config.node}/{config.incarnation}".encode())
        self._chance = np.random.Generator(np.random.Philox(seed))
        self._complaint = ""
        self._known_as = False
        self.pause_max_s = PAUSE_MAX_S
        self.connected = False
        """Whether the controller has said welcome on the present connection."""
        self.heard_at = time.monotonic()
        """When there was a connection last, on this machine's monotonic clock."""

    def send(self, message: FromAgent) -> bool:
        """Queue a message; return whether there is a connection that may carry it."""
        if not self.connected or self._socket is None:
            return False
        try:
            self._outgoing.put_nowait(_text(message))
        except asyncio.QueueFull:
            log.warning("the controller has not read %d messages; reconnecting", OUTGOING_MAX)
            self._cut()
            return False
        except (ValueError, OverflowError) as error:
            # What a rank said may have no place in a message; the rest of the node's news does.
            log.error("%s is not sent: %s", type(message).__name__, error)  # noqa: TRY400 - one line
        return True

    async def flush(self, within_s: float) -> None:
        """Wait until everything queued is handed to the kernel, or the connection is lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._outgoing.join()

    def set_reachable(self, *, on: bool) -> None:
        """Off: hang up without a word and call nobody, as in a network partition."""
        if on:
            self._reachable.set()
        else:
            self._reachable.clear()
            self._cut()

    async def run(self) -> None:
        """Connect, and connect again, for ever.

        Raises:
            RefusedError: if the controller refuses the token before it ever took it.
        """
        pause_s = PAUSE_MIN_S
        while True:
            await self._reachable.wait()
            lasted = False
            url = ""
            try:
                url = self._url()
                lasted = await self._converse(url)
            except InvalidStatus as error:
                self._refused(error, url)
            except (OSError, WebSocketException, _DropError, msgspec.MsgspecError) as error:
                self._complain(f"no controller at {url or self._config.controller_file}: {error}")
            except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may be well
                self._complain(f"{type(error).__name__}: {error}: {url}")
            finally:
                self.connected = False
                self._empty()
            pause_s = PAUSE_MIN_S if lasted else min(pause_s * 2, self.pause_max_s)
            await self._pause(pause_s * float(self._chance.uniform(0.5, 1.0)))

    # One connection ----------------------------------------------------------------------------

    async def _converse(self, url: str) -> bool:
        """Connect and carry messages until it ends; return whether it lasted for a while."""
        async with connect(
            url,
            additional_headers={"Authorization": f"Bearer {self._config.token}"},
            compression=None,
            proxy=None,
            open_timeout=OPEN_WITHIN_S,
            ping_interval=5.0,
            ping_timeout=20.0,
            close_timeout=0.5,
            max_size=MESSAGE_MAX_BYTES,
            logger=_quiet,
        ) as connection:
            if not self._reachable.is_set():
                return False
            self._socket = connection
            sender: asyncio.Task[None] | None = None
            begun = time.monotonic()
            try:
                await connection.send(encode(self._joined()).decode())
                async with asyncio.timeout(WELCOME_WITHIN_S):
                    self._meet(await self._receive(connection))
                sender = asyncio.create_task(self._send_all(connection))
                while True:
                    order = await self._receive(connection)
                    self.heard_at = time.monotonic()
                    self._obey(order)
            except ConnectionClosed as closed:
                log.info("connection to the controller ended: %s", closed)
            except TimeoutError as error:
                raise _DropError(f"no welcome in {WELCOME_WITHIN_S:g} s") from error
            except BaseException:
                self._cut()  # no closing handshake: the other side may not be there for it
                raise
            finally:
                if self.connected:
                    self.heard_at = time.monotonic()
                self.connected = False
                self._socket = None
                if sender is not None:
                    sender.cancel()
        return time.monotonic() - begun > 1.0

    async def _receive(self, connection: ClientConnection) -> ToAgent:
        data = await connection.recv()
        try:
            return read_to_agent(data)
        except msgspec.DecodeError as error:
            raise _DropError(f"what came is no order: {error}") from error

    def _meet(self, answer: ToAgent) -> None:
        if not isinstance(answer, Welcome):
            raise _DropError(f"first answer is {type(answer).__name__}, expected Welcome")
        if answer.version != PROTOCOL_VERSION or answer.run != self._config.run:
            raise _DropError(
                f"controller is of run {answer.run}, protocol {answer.version}; "
                f"expected {self._config.run}, protocol {PROTOCOL_VERSION}"
            )
        self._complaint = ""
        self._known_as = True
        self.pause_max_s = answer.timeouts.reconnect_s
        self.connected = True
        self.heard_at = time.monotonic()
        self._welcomed(answer)

    async def _send_all(self, connection: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                text = await self._outgoing.get()
                try:
                    await connection.send(text)
                finally:
                    self._outgoing.task_done()

    def _cut(self) -> None:
        self.connected = False
        if self._socket is not None:
            self._socket.transport.abort()
        self._empty()

    def _empty(self) -> None:
        while not self._outgoing.empty():
            self._outgoing.get_nowait()
            self._outgoing.task_done()

    # Between two connections --------------------------------------------------------------------

    def _url(self) -> str:
        """Return where the controller listens now. Raises OSError or MsgspecError."""
        with Path(self._config.controller_file).open("rb") as file:
            text = file.read(_ADDRESS_MAX_BYTES)
        parts = urlsplit(msgspec.json.decode(text, type=ControllerAddress).url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise _DropError(f"address is {urlunsplit(parts)!r}, expected http://host:port")
        scheme = "wss" if parts.scheme == "https" else "ws"
        return urlunsplit((scheme, parts.netloc, AGENT_PATH, "", ""))

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until another controller has made itself known."""
        before = _stamp(self._config.controller_file)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK_S))
            if _stamp(self._config.controller_file) != before:
                return

    def _refused(self, error: InvalidStatus, url: str) -> None:
        status = error.response.status_code
        what = {401: "the token is not the one of its run", 409: "this node is taken"}.get(
            status, f"HTTP status {status}"
        )
        if status == 401 and not self._known_as:
            raise RefusedError(f"refused by {url}: {what}") from error
        # Once it was right, it is the address that is wrong: another run may have the port now.
        self._complain(f"refused by {url}: {what}")

    def _complain(self, text: str) -> None:
        """Log why there is no connection, once for every reason."""
        if text != self._complaint:
            log.warning("%s; trying again", text)
        self._complaint = text


def _text(message: FromAgent) -> str:
    data = encode(message)
    if len(data) > MESSAGE_MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, limit {MESSAGE_MAX_BYTES}")
    return data.decode()


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_ino)


_quiet = logging.getLogger("orchestrator.agent.channel.websockets")
_quiet.setLevel(logging.CRITICAL)
