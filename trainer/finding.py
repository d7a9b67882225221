"""Finds the files of a source, wherever they are, and says which version of each it found."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from orchestrator.worker import Aborted, MisconfiguredError
from trainer.retrying import SourceUnavailableError, may_pass, patiently

FORMATS = {".txt": "text", ".py": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
SUFFIXES = tuple(FORMATS)
_CONTENT = ("ETag", "etag", "md5Hash", "checksum")
_TIMES = ("mtime", "created", "LastModified", "last_modified")
WHERE = "spec.trainer.data"
HINT = f"name files, folders or globs of {', '.join(SUFFIXES)}; fsspec addresses work too"


@dataclass(frozen=True, slots=True)
class Source:
    """One file with text."""

    address: str
    """What the run file names; several sources may come from one address."""
    files: Any
    """The fsspec file system that it is on."""
    path: str
    info: dict[str, Any]
    """What its file system knows of it without reading it."""

    @property
    def fingerprint(self) -> str:
        """Changes when the file does, as far as that can be told."""
        return str(sorted((str(key), str(value)) for key, value in self.info.items()))

    @property
    def version(self) -> str:
        """The same in few words, and equal when asked for again."""
        return version_of(self.info)

    @property
    def size(self) -> int:
        """In bytes; 0 if its file system does not say."""
        return self.info.get("size") or 0


def find(address: str, form: str | None, check: Callable[[], None], attempts: int) -> list[Source]:
    """Return the files that an address means, sorted by name.

    Args:
        address: a file, a folder or a glob.
        form: of the files; None to go by the ends of their names.
        check: called a few times per 0.1 s while it does not answer; may raise.
        attempts: how often it is asked.

    Raises:
        MisconfiguredError: if it leads nowhere, or to nothing that can be read.
        SourceUnavailableError: if it does not answer.
    """
    try:
        files, path = fsspec.core.url_to_fs(address)
        files.invalidate_cache()  # this process may have looked before the source changed
        infos = patiently(partial(_listed, files, path), check, address, attempts)
        others = [p for p, info in infos.items() if _is_other(files, p, info)]
    except SourceUnavailableError as error:
        raise SourceUnavailableError(f"{WHERE}: {error}", error.hint) from error
    except (OSError, ValueError, ImportError) as error:
        raise MisconfiguredError(f"{WHERE}: {error}: {address}", hint=HINT) from error
    except Aborted:
        raise
    except Exception as error:
        # fsspec knows some thirty schemes; what one makes of a bad address is its own affair.
        why = f"{type(error).__name__}: {error}"
        raise MisconfiguredError(f"{WHERE}: {why}: {address}", hint=HINT) from error
    if list(infos) == [path]:
        _require_text(path, is_file=not others, any_end=form is not None)
    sources = [
        Source(address, files, p, infos[p])
        for p in sorted(infos.keys() - others)
        if p.endswith(SUFFIXES) or (form is not None and list(infos) == [path])
    ]
    if not sources:
        raise MisconfiguredError(
            f"{WHERE}: nothing there, expected text ({', '.join(SUFFIXES)}): {address}",
            hint="the address is looked up on every node; a relative path may differ there",
        )
    return sources


def version_of(info: dict[str, Any]) -> str:
    """Return what tells one version of a file from another, however fsspec came to know of it.

    What a listing says of a file has other fields than what is said of the file alone.
    """
    kept = [name for name in _CONTENT if info.get(name) is not None]
    kept = kept[:1] or [name for name in _TIMES if info.get(name) is not None][:1]
    return ", ".join([f"{info.get('size')} bytes", *(f"{name} {info[name]}" for name in kept)])


def _listed(files: Any, path: str) -> dict[str, Any]:  # noqa: ANN401 - as fsspec made it
    """Return what fsspec knows of all that is meant by a path, by its own path."""
    if glob.has_magic(path):
        return dict(files.glob(path, detail=True))
    try:
        # Unlike `isfile`, it does not take a server that is busy for one that has no such file.
        info = files.info(path)
    except FileNotFoundError as error:
        if may_pass(error):
            raise
        return {}
    if info.get("type") == "directory":
        # What begins with a dot is not meant to be seen: .git and the like.
        found = files.find(path, detail=True)
        return {p: info for p, info in found.items() if "/." not in p[len(path) :]}
    return {path: info}


def _is_other(files: Any, path: str, info: dict[str, Any]) -> bool:  # noqa: ANN401 - the same
    """Whether it is no file; a link that leads nowhere is kept: reading it says so."""
    match info.get("type"):
        case "file" | "link":
            return False
        case "directory":
            return True
    # In a local folder links are of type `other`, wherever they lead.
    return is_no_file(files, path)


def is_no_file(files: Any, path: str) -> bool:  # noqa: ANN401 - the same
    """Whether something else than a file is there, a pipe say, that a read might wait on for ever.

    Args:
        files: the fsspec file system.
        path: on it.
    """
    return bool(files.exists(path)) and not files.isfile(path)


def _require_text(path: str, *, is_file: bool, any_end: bool) -> None:
    if not is_file:
        raise MisconfiguredError(f"{WHERE}: neither file nor folder: {shown(path)}", hint=HINT)
    if not any_end and not path.endswith(SUFFIXES):
        raise MisconfiguredError(
            f"{WHERE}: ends in {Path(path).suffix or 'nothing'!r}, expected one of "
            f"{', '.join(SUFFIXES)}: {shown(path)}",
            hint=f"{HINT}, or say which `format` it is",
        )


def shown(path: str) -> str:
    """Return a path as it can be printed, and sent: not every name is text."""
    return path if path.isprintable() else ascii(path)
