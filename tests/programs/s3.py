"""An S3 server on loopback: prints its port, and ends when its standard input does.

What it reads there is how it is from then on: `ahead N`, its clock is N seconds ahead of this
machine's; `read-only`, it lets nobody change anything; `private N`, it lets nobody read of the next
N shards that are asked for; `well`.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from moto.moto_server import threaded_moto_server
from moto.server import ThreadedMotoServer

SKEW_MAX = timedelta(minutes=15)
SIGNED_AT = "%Y%m%dT%H%M%SZ"
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{words}</Message></Error>"
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Moods:
    """How the server is, before anybody asks moto."""

    ahead = timedelta()
    read_only = False
    private = 0

    def be(self, told: str) -> None:
        """Be as a line says."""
        mood, _, number = told.strip().partition(" ")
        self.ahead = timedelta(seconds=float(number or 0) if mood == "ahead" else 0)
        self.read_only = mood == "read-only"
        self.private = int(number or 0) if mood == "private" else 0

    @property
    def now(self) -> datetime:
        """What it takes the time for."""
        return datetime.now(UTC) + self.ahead  # noqa: TID251 - a service has a clock of its own

    def over(self, application: Application) -> Application:
        """Return an application that refuses as the mood is, and else does what this one does."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            signed = environ.get("HTTP_X_AMZ_DATE")
            if signed and abs(self.now - _moment(signed)) > SKEW_MAX:
                return refuse(environ, start, "RequestTimeTooSkewed", "The difference is too large")
            if self.read_only and environ["REQUEST_METHOD"] not in {"GET", "HEAD"}:
                return refuse(environ, start, "AccessDenied", "Access Denied")
            if self.private and environ["REQUEST_METHOD"] == "GET" and "/gen/" in _path(environ):
                self.private -= 1
                return refuse(environ, start, "AccessDenied", "Access Denied")
            return application(environ, start)

        def refuse(
            environ: dict[str, Any], start: Callable[..., Any], code: str, words: str
        ) -> Iterable[bytes]:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            told = ERROR.format(code=code, words=words).encode()
            told = b"" if environ["REQUEST_METHOD"] == "HEAD" else told
            now = format_datetime(self.now, usegmt=True)
            start("403 Forbidden", [("Content-Length", str(len(told))), ("Date", now)])
            return [told]

        return answer


def _path(environ: dict[str, Any]) -> str:
    return str(environ.get("PATH_INFO", ""))


def _moment(signed: str) -> datetime:
    return datetime.strptime(signed, SIGNED_AT).replace(tzinfo=UTC)


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    moods, made = Moods(), threaded_moto_server.DomainDispatcherApplication
    threaded_moto_server.DomainDispatcherApplication = lambda backend: moods.over(made(backend))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with contextlib.redirect_stdout(sys.stderr):
        server.start()
    _, port = server.get_host_and_port()
    print(port, flush=True)
    for line in sys.stdin:
        moods.be(line)
        print("so it is", flush=True)
    server.stop()


if __name__ == "__main__":
    main()
