"""The one HTTP server of a run: agents connect here; liveness and metrics are asked here.

Runs on a thread of its own with its own event loop. What arrives is handed to the world at once;
what goes out is queued per connection, bounded, so that one slow agent holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from orchestrator.protocol.agent import AGENT_PATH
from orchestrator.protocol.messages import MESSAGE_MAX_BYTES, read_from_agent
from orchestrator.server.listening import listen
from orchestrator.server.metrics import reading_token
from orchestrator.worlds.agents import AgentWorld

log = logging.getLogger(__name__)
OUTGOING_MAX = 1024
"""Messages that may wait for one agent."""
START_WITHIN_S = 20.0
_STATE = "holdfast.incoming"


class Server:
    """Serves one world. Started with `start`, ended with `stop`.

    Args:
        world: takes what arrives.
        token: asked of every agent.
        metrics: makes what `/metrics` answers to whoever shows `metrics.reading_token`; without it
            there is no such path.
        host: address to listen at; loopback unless the cluster is not this machine.
        port: 0 has the system choose.
    """

    def __init__(
        self,
        world: AgentWorld,
        token: str,
        *,
        metrics: Callable[[], bytes] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._world, self._token, self._metrics = world, token, metrics
        self._socket = listen(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        routes = [WebSocketRoute(AGENT_PATH, self._agent), Route("/healthz", _healthz)]
        if metrics is not None:
            routes.append(Route("/metrics", self._scraped))
        app = Starlette(routes=routes)
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="off",
                ws=_Incoming,
                ws_max_size=MESSAGE_MAX_BYTES,
                # Agents are heard several times a second; a ping would add nothing.
                ws_ping_interval=None,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="holdfast-server", daemon=True)

    def start(self) -> None:
        """Listen; returns when connections are accepted. Raises TimeoutError if that never is."""
        self._thread.start()
        waited = threading.Event()
        for _ in range(int(START_WITHIN_S / 0.01)):
            if self._server.started:
                return
            waited.wait(0.01)
        raise TimeoutError(f"server is not listening after {START_WITHIN_S:g} s")

    def stop(self) -> None:
        """Close all connections and end the thread, bounded."""
        self._server.leave()
        self._thread.join(5)

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    async def _agent(self, websocket: WebSocket) -> None:
        if not _authorised(websocket, self._token):
            await websocket.send_denial_response(PlainTextResponse("wrong token", 401))
            return
        link, incoming = _AgentLink(websocket), _incoming(websocket)
        incoming.sink = partial(self._take, link)
        await websocket.accept()
        sender = asyncio.create_task(link.send_all())
        try:
            while True:
                await websocket.receive_text()
        except (WebSocketDisconnect, RuntimeError):
            pass  # closed by either side; the world is told below
        finally:
            incoming.sink = None
            self._world.take(link, None)
            link.closed = True
            sender.cancel()
            with contextlib.suppress(WebSocketDisconnect, RuntimeError, asyncio.CancelledError):
                await websocket.close()

    def _take(self, link: _AgentLink, data: bytes) -> None:
        if link.closed:
            return
        try:
            message = read_from_agent(data)
        except msgspec.DecodeError as error:
            link.close(f"an agent sent what is no message: {error}")
            link.closed = True
        else:
            self._world.take(link, message)

    async def _scraped(self, request: HTTPRequest) -> Response:
        assert self._metrics is not None
        if not _authorised(request, reading_token(self._token)):
            return PlainTextResponse("wrong token", 401, {"WWW-Authenticate": "Bearer"})
        # Not on the loop: it waits for the controller, which may be deciding.
        text = await asyncio.to_thread(self._metrics)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Incoming(WebSocketsSansIOProtocol):
    """Hands what arrives straight to whoever takes it, where it is read.

    uvicorn itself would queue it, wake the task of its connection, and stop reading until then:
    two system calls and a turn of the loop a message, nearly half of what a beat costs. How much
    may wait is the world's to bound (`QUEUE_MAX`): it takes in whatever comes, at once.

    Attributes:
        sink: takes a message; None before its connection is accepted, and when it has ended.
    """

    sink: Callable[[bytes], None] | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            self.scope["state"][_STATE] = self

    def send_receive_event_to_app(self) -> None:
        frames, self.frames = self.frames, []
        if self.sink is not None and not self.close_sent:
            self.sink(frames[0] if len(frames) == 1 else b"".join(frames))


def _incoming(websocket: WebSocket) -> _Incoming:
    found = websocket.scope["state"][_STATE]
    assert isinstance(found, _Incoming)
    return found


class _Uvicorn(uvicorn.Server):
    """Sleeps until it is to end; uvicorn itself would look ten times a second."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while not self.should_exit:
            await self._over.wait()

    def leave(self) -> None:
        """End it. From any thread, once it serves."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._over.set)


class _AgentLink:
    """One agent's connection, for the world (`worlds.agents.Link`)."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue(OUTGOING_MAX)
        self.closed = False

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and every link with it
            self._loop.call_soon_threadsafe(self._put, data)

    def close(self, reason: str) -> None:
        """See `Link.close`."""
        log.warning("closing an agent's connection: %s", reason)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, None)

    def _put(self, data: bytes | None) -> None:
        if self._outgoing.full():
            log.warning("an agent has not taken %d messages; cut off", OUTGOING_MAX)
            while not self._outgoing.empty():
                self._outgoing.get_nowait()
            data = None
        self._outgoing.put_nowait(data)

    async def send_all(self) -> None:
        """Send what is queued, in order, until the connection closes."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while (data := await self._outgoing.get()) is not None:
                await self._websocket.send_text(data.decode())
            await self._websocket.close()


def _authorised(connection: HTTPConnection, token: str) -> bool:
    shown = connection.headers.get("authorization", "")
    return hmac.compare_digest(shown.encode(), f"Bearer {token}".encode())


async def _healthz(_request: HTTPRequest) -> JSONResponse:
    return JSONResponse({"ok": True})
