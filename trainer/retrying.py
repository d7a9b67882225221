"""Tells what may pass, such as a busy server, from what will not, and tries the former again."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

T = TypeVar("T")
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
"""Doubles with each attempt: 15 s in all, after which a restart of the ranks is the next try."""
ATTEMPTS_KNOWN = 2
"""Of a node that can do without an answer: others may be waiting for it in a recovery."""
_LOOK_S = 0.05
_BUSY = frozenset({408, 425, 429})
"""HTTP statuses below 500 that ask to come again."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_NUMBERS = frozenset(
    {errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EOPNOTSUPP}
)
_CLIENTS = frozenset({"aiohttp", "botocore", "aiobotocore", "s3fs", "gcsfs", "urllib3"})
"""Libraries below fsspec whose exceptions are of their own kind."""


class SourceUnavailableError(Exception):
    """A source did not answer, again and again; it may do so when the ranks are started anew."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help, as far as the error can tell.

    fsspec calls a file that a busy server would not show "not found", and keeps the cause.
    """
    statuses = [status for each in _chain(error) if (status := _status(each)) is not None]
    if statuses:
        return statuses[-1] >= 500 or statuses[-1] in _BUSY
    return any(_may_pass(each) for each in _chain(error))


def is_of_source(error: BaseException) -> bool:
    """Whether it is what a source is read through that raised it, and not a mistake of ours."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in _CLIENTS


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):
        nameless = type(error) is OSError and error.errno is None
        return not (nameless or isinstance(error, _LASTING) or error.errno in _LASTING_NUMBERS)
    return is_of_source(error)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of aiohttp or botocore carries."""
    found = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if found is None and isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return found if isinstance(found, int) and found >= 400 else None


def patiently(
    act: Callable[[], T], check: Callable[[], None], where: str, attempts: int = ATTEMPTS
) -> T:
    """Return what `act` does, tried again while what stops it may pass.

    Args:
        act: what to try.
        check: called a few times per 0.1 s between attempts; may raise.
        where: what is read, for the log.
        attempts: how often, the first time included.

    Raises:
        SourceUnavailableError: if it did not pass within so many attempts.
        Exception: whatever else `act` raises, at once.
    """

    def sleep(seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            check()
            time.sleep(min(left_s, _LOOK_S))

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        print(  # noqa: T201 - the rank's log
            f"data: attempt {state.attempt_number} of {attempts}, {words(error)}: {where}",
            file=sys.stderr,
        )

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(FIRST_PAUSE_S),
        sleep=sleep,
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(act)
    except Exception as error:
        if not may_pass(error):
            raise
        raise SourceUnavailableError(
            f"no answer in {attempts} attempts, {words(error)}: {where}",
            "is the server up, and the network between it and this node?",
        ) from error


def words(error: BaseException | None) -> str:
    """Say what happened, in the words of what happened first: fsspec has others for it."""
    if error is None:
        return "no answer"
    *_, first = _chain(error)
    return " ".join(f"{type(first).__name__}: {first}".split())
