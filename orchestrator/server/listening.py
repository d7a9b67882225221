"""The socket that a controller listens with, and whether it could be had.

Apart from the server, so that `holdfast run` looks at a port without loading what serves there.
"""

from __future__ import annotations

import socket


class PortInUseError(Exception):
    """The address to listen at is taken."""

    hint = "Choose another port, or leave it out to have the system choose a free one."


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; `port` 0 has the system choose.

    Raises:
        PortInUseError: if the address is taken, or not one of this machine.
    """
    # With the protocol named, asyncio switches Nagle's algorithm off for what is accepted. Without,
    # an order right behind another waits up to 40 ms for the first one's acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise PortInUseError(f"{error.strerror}: {host}:{port}") from error
    return listener


def check_port(port: int) -> None:
    """Raise PortInUseError if something listens at a port of this machine already."""
    listen("127.0.0.1", port).close()
