"""The agent's end of one rank's control socket, on the event loop. Never waits for the rank."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from orchestrator.protocol.rank import (
    Framer,
    FromRank,
    ProtocolError,
    ToRank,
    frame,
    read_from_rank,
)

UNSENT_MAX_BYTES = 16 << 20
"""A rank that reads nothing (it is frozen) may have this much waiting for it."""
_RECEIVE_BYTES = 1 << 16
_RECEIVES_MAX = 64
"""Receives in a row, after which the loop gets to look at others."""


class Control:
    """One connection.

    Args:
        sock: the agent's end; owned from now on.
        on_message: called for every message, in order.
        on_broken: called once, with the reason, when the rank sent what is no message or takes
            nothing any more. Nothing is received after that.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[FromRank], None],
        on_broken: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._framer = Framer()
        self._unsent = bytearray()
        self._on_message, self._on_broken = on_message, on_broken
        self._receiving = True
        self._loop.add_reader(sock.fileno(), self._receive)

    def send(self, message: ToRank) -> None:
        """Send at once as much as the rank's buffer takes, the rest when it reads on."""
        if self._socket.fileno() < 0:
            return
        waiting = bool(self._unsent)
        self._unsent += frame(message)
        if not waiting:
            self._flush()
            if self._unsent:
                self._loop.add_writer(self._socket.fileno(), self._flush)
        if len(self._unsent) > UNSENT_MAX_BYTES:
            self._broken(f"{len(self._unsent)} bytes are waiting to be read by it")

    def drain(self) -> None:
        """Take in all that the rank has sent; for the moment when it is found to have ended."""
        while self._receiving and self._receive_once():
            pass

    def close(self) -> None:
        """Close it; nothing is called any more."""
        self._stop_receiving()
        self._stop_sending()
        self._socket.close()

    def _receive(self) -> None:
        for _ in range(_RECEIVES_MAX):
            if not self._receiving or not self._receive_once():
                return

    def _receive_once(self) -> bool:
        """Take in one piece; return whether there may be more."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            # Its end is seen through its process descriptor, which can not be faked.
            self._stop_receiving()
            return False
        try:
            for body in self._framer.feed(data):
                message = read_from_rank(body)
                if self._receiving:
                    self._on_message(message)
        except ProtocolError as error:
            self._broken(str(error))
            return False
        return True

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            # It is gone or closed its end; nobody will read the rest.
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self._stop_sending()

    def _broken(self, reason: str) -> None:
        if self._receiving:
            self._stop_receiving()
            self._stop_sending()
            self._on_broken(reason)

    def _stop_receiving(self) -> None:
        if self._receiving:
            self._receiving = False
            self._loop.remove_reader(self._socket.fileno())

    def _stop_sending(self) -> None:
        self._unsent.clear()
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())
