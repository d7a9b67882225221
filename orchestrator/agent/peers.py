"""How agents pass each other shards: an HTTP server on this node's loop, and the client to it.

    GET /shards/RANK/STEP   the shard, as a stream (transfer.py)
    PUT /shards/RANK/STEP   a copy of it; held once this is answered with 201

Every request shows the run's token. A PUT also says what lineage its sender knows of, so that an
older one is refused, and a node that takes copies without being part of the world keeps up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orchestrator.agent.shards import (
    ERRORS,
    KeeperError,
    Lineage,
    MalformedError,
    Shard,
    Shelf,
    StaleError,
    UnreachableError,
)
from orchestrator.agent.transfer import pieces_of, receive, stream_size
from orchestrator.protocol.ids import Generation, Rank, Step

GENERATION = "Holdfast-Generation"
RESTORE = "Holdfast-Restore"
RETAINED = "Holdfast-Retained"
_BY_STATUS = {error.status: error for error in ERRORS}
_PAUSES_S = (0.05, 0.2)
"""Before a request that found no answer is made again; an idle connection may just have ended."""
_REASON_MAX = 2000
T = TypeVar("T")


class PeerServer:
    """Serves this node's shelf to other agents.

    Attributes:
        unreachable: True refuses everybody and breaks off what is under way.
        transfer_s: a peer that has not sent or taken a whole shard after this long is dropped.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        token: str,
        new_file: Callable[[Rank, Step], Path],
        threads: Executor,
        on_copy: Callable[[Generation, Shard], None],
        transfer_s: float,
    ) -> None:
        """Serve nobody yet.

        Args:
            shelf: what is served, and where copies go.
            token: asked of everybody.
            new_file: names a file for a copy.
            threads: where copies are verified.
            on_copy: called with the sender's generation for each copy that is held.
            transfer_s: see the class.
        """
        self.unreachable = False
        self.transfer_s = transfer_s
        self._shelf = shelf
        self._new_file = new_file
        self._credentials = f"Bearer {token}".encode()
        self._threads = threads
        self._on_copy = on_copy
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def open(self, host: str) -> str:
        """Serve on a free port of `host`; return "host:port".

        Raises:
            OSError: if the host is not an address of this machine.
        """
        # With its protocol named, asyncio switches Nagle's algorithm off; without, every answer
        # waits 40 ms for an acknowledgement.
        family = socket.getaddrinfo(host, 0)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.bind((host, 0))
            listener.listen()
        except OSError:
            listener.close()
            raise
        where = "/shards/{rank:int}/{step:int}"
        routes = [
            Route(where, self._answered(self._get), methods=["GET"]),
            Route(where, self._answered(self._put), methods=["PUT"]),
        ]
        self._server = _Server(
            uvicorn.Config(
                Starlette(routes=routes),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=600,
                timeout_graceful_shutdown=1,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        # The socket listens already: whoever calls before the server is up waits a moment.
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        return f"{shown}:{listener.getsockname()[1]}"

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop serving; what is under way has a second to finish."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait([self._serving], timeout=timeout_s)
        if not done:
            self._serving.cancel()

    def _answered(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Check the token first, and turn errors into answers."""

        async def respond(request: Request) -> Response:
            shown = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(shown, self._credentials):
                return PlainTextResponse("token is not this run's", 401)
            try:
                if self.unreachable:
                    raise _cut_off()
                async with asyncio.timeout(self.transfer_s):
                    return await answer(request)
            except KeeperError as error:
                return PlainTextResponse(str(error), error.status)
            except TimeoutError:
                return PlainTextResponse(f"not done after {self.transfer_s:g} s", 408)
            except ClientDisconnect:
                return PlainTextResponse("nobody is there to read this", 400)

        return respond

    async def _get(self, request: Request) -> Response:
        shard = self._shelf.require(*_place(request))
        return _ShardResponse(shard, self)

    async def _put(self, request: Request) -> Response:
        lineage = _lineage_of(request)
        rank, step = _place(request)
        known = self._shelf.lineage
        if lineage.generation < known.generation:
            raise StaleError(f"copy is of {lineage}, here it is {known}")
        self._shelf.begin(lineage.generation, lineage.restore)
        self._shelf.retain(lineage.retained)
        announced = _number(request, "Content-Length")
        path = self._new_file(rank, step)
        shard = await receive(
            _while_reachable(self, request.stream()), announced, path, (rank, step), self._threads
        )
        # Time has passed: this compares with what is known now.
        self._shelf.put(shard)
        self._on_copy(lineage.generation, shard)
        return PlainTextResponse("held", 201)

    def pinned(self, shard: Shard) -> contextlib.AbstractContextManager[Shard]:
        """Keep a shard as it is while it is served."""
        return self._shelf.pinned(shard)


class PeerClient:
    """Calls the servers of other agents; keeps connections open between calls.

    Attributes:
        unreachable: True calls nobody.
    """

    def __init__(self, token: str) -> None:
        self.unreachable = False
        # Bounds are the callers': a shard of a large model takes as long as it takes. And no proxy
        # of the environment stands between two agents.
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def rehearse(self, address: str) -> None:
        """Make a call for nothing: the first one of a process waits 0.1 s for imports."""
        with contextlib.suppress(httpx.HTTPError):
            await self._http.get(f"http://{address}/", timeout=5.0)

    async def send(self, address: str, shard: Shard, lineage: Lineage) -> None:
        """Have another agent hold a copy of a shard, which the caller has pinned.

        Raises:
            KeeperError: of the class that says why it does not.
        """
        restore = "" if lineage.restore is None else str(lineage.restore)
        headers = {
            "Content-Length": str(stream_size(shard)),
            GENERATION: str(lineage.generation),
            RESTORE: restore,
            RETAINED: str(lineage.retained),
        }

        async def attempt() -> None:
            pieces = _while_reachable(self, pieces_of(shard))
            url = _url(address, shard.rank, shard.step)
            response = await self._http.put(url, content=pieces, headers=headers)
            _require_success(response)

        await self._persist(address, attempt)

    async def fetch(
        self, address: str, wanted: tuple[Rank, Step], path: Path, threads: Executor
    ) -> Shard:
        """Bring a shard from another agent into a new file, verified.

        Raises:
            KeeperError: of the class that says why not; there is no file then.
        """

        async def attempt() -> Shard:
            async with self._http.stream("GET", _url(address, *wanted)) as response:
                if response.is_error:
                    await response.aread()
                    _require_success(response)
                announced = int(response.headers.get("Content-Length", 0))
                pieces = _while_reachable(self, response.aiter_raw())
                return await receive(pieces, announced, path, wanted, threads)

        return await self._persist(address, attempt)

    async def _persist(self, address: str, attempt: Callable[[], Awaitable[T]]) -> T:
        for pause_s in (*_PAUSES_S, None):
            if self.unreachable:
                raise _cut_off()
            try:
                return await attempt()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if pause_s is None:
                    raise UnreachableError(f"{address}: {type(error).__name__} {error}") from error
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


class _ShardResponse(StreamingResponse):
    """A shard, pinned while it is sent."""

    def __init__(self, shard: Shard, server: PeerServer) -> None:
        super().__init__(
            _while_reachable(server, pieces_of(shard)),
            headers={"Content-Length": str(stream_size(shard))},
        )
        self._shard = shard
        self._peer_server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whoever reads sees the answer end early, and no half of a shard passes verification.
        with (
            self._peer_server.pinned(self._shard),
            contextlib.suppress(KeeperError, TimeoutError),
        ):
            async with asyncio.timeout(self._peer_server.transfer_s):
                await super().__call__(scope, receive, send)


class _Server(uvicorn.Server):
    """A server that is a guest on the agent's loop: signals are the agent's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _while_reachable(
    end: PeerServer | PeerClient, pieces: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    async for piece in pieces:
        if end.unreachable:
            raise _cut_off()
        yield piece


def _cut_off() -> UnreachableError:
    return UnreachableError("this node is cut off by a fault plan")


def _url(address: str, rank: Rank, step: Step) -> str:
    return f"http://{address}/shards/{rank}/{step}"


def _place(request: Request) -> tuple[Rank, Step]:
    return Rank(request.path_params["rank"]), Step(request.path_params["step"])


def _lineage_of(request: Request) -> Lineage:
    restore = None if request.headers.get(RESTORE) == "" else Step(_number(request, RESTORE))
    return Lineage(
        Generation(_number(request, GENERATION)), restore, Step(_number(request, RETAINED))
    )


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "none")
    try:
        return int(text)
    except ValueError:
        raise MalformedError(f"header {name} is {text[:80]!r}, expected a number") from None


def _require_success(response: httpx.Response) -> None:
    if response.is_error:
        kind = _BY_STATUS.get(response.status_code, KeeperError)
        raise kind(f"{response.url.netloc.decode()}: {response.text[:_REASON_MAX]}")
