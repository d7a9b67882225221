"""Reads parts of files in a folder, wherever fsspec reaches it, and says what is not there."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar

import fsspec
import msgspec

from orchestrator.worker import MisconfiguredError

T = TypeVar("T")
SMALL_BYTES_MAX = 64 << 20
"""Nothing that is read whole, other than weights, may be longer."""
SAMPLE_BYTES = 64 << 10
HINT = (
    "name a folder with config.json and *.safetensors (Hugging Face), with params.json and "
    "consolidated.*.pth (Meta), or of a run of holdfast; fsspec addresses work for the first two"
)


class Folder:
    """A folder with weights.

    Args:
        address: path or fsspec address.

    Raises:
        MisconfiguredError: if there is no such folder.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _told(address):
            self._files, self._path = fsspec.core.url_to_fs(address)
            if not self._files.isdir(self._path):
                raise FileNotFoundError("no such folder")
            listed = self._files.ls(self._path, detail=True)
        self.sizes: dict[str, int] = {
            str(info["name"]).rstrip("/").rpartition("/")[2]: int(info["size"] or 0)
            for info in listed
            if info["type"] == "file" or self._leads_to_a_file(info)
        }
        """Bytes of every file, by name."""

    def where(self, name: str) -> str:
        """Return the words that name a file in messages."""
        return f"{self.address.rstrip('/')}/{name}"

    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises MisconfiguredError if it is not there."""
        if name not in self.sizes:
            raise MisconfiguredError(f"no such file: {self.where(name)}", hint=HINT)
        return self.sizes[name]

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """Give a file to read from."""
        self.size(name)
        with _told(self.where(name)), self._files.open(f"{self._path}/{name}", "rb") as file:
            yield file

    def fill(self, name: str, start: int, buffer: memoryview) -> None:
        """Read as many bytes as the buffer has.

        Raises:
            MisconfiguredError: if the file ends before that, or can not be read.
        """
        view = buffer.cast("B")
        if start + len(view) > self.size(name):
            raise MisconfiguredError(
                f"{self.size(name)} bytes, expected at least {start + len(view)}: "
                f"{self.where(name)}",
                hint="the file was cut short: copy it again",
            )
        with self.opened(name) as file:
            file.seek(start)
            at = 0
            while at < len(view):
                got = file.readinto(view[at:])  # type: ignore[attr-defined]
                if not got:
                    raise OSError(f"it ends after {start + at} of {self.size(name)} bytes")
                at += got

    def text(self, name: str) -> bytes:
        """Return all of a small file. Raises MisconfiguredError if it is not small."""
        size = self.size(name)
        if size > SMALL_BYTES_MAX:
            raise MisconfiguredError(
                f"{size} bytes, expected at most {SMALL_BYTES_MAX}: {self.where(name)}", hint=HINT
            )
        content = bytearray(size)
        self.fill(name, 0, memoryview(content))
        return bytes(content)

    def json(self, name: str, kind: type[T]) -> T:
        """Return what a small file says. Raises MisconfiguredError if it is not of that kind."""
        return decoded(self.text(name), kind, self.where(name))

    def sample(self, names: list[str]) -> str:
        """Return a digest of sizes, beginnings, middles and ends of files."""
        digest = hashlib.sha256()
        for name in sorted(names):
            size = self.size(name)
            length = min(SAMPLE_BYTES, size)
            digest.update(msgspec.json.encode([name, size]))
            for start in sorted({0, (size - length) // 2, size - length}):
                piece = bytearray(length)
                self.fill(name, start, memoryview(piece))
                digest.update(piece)
        return digest.hexdigest()

    def _leads_to_a_file(self, info: dict[str, Any]) -> bool:
        # Downloads are links into a cache, which a local listing has as `link` or `other`.
        return info["type"] != "directory" and bool(self._files.isfile(info["name"]))


def decoded(content: bytes, kind: type[T], where: str) -> T:
    """Return JSON from anywhere as what it should be. Raises MisconfiguredError if it is not."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MisconfiguredError(f"not what was expected: {error}: {where}", hint=HINT) from error


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Say what failed in our words: what fsspec's schemes raise is their own affair."""
    try:
        yield
    except MisconfiguredError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise MisconfiguredError(f"{error}: {where}", hint=HINT) from error
    except Exception as error:
        raise MisconfiguredError(f"{type(error).__name__}: {error}: {where}", hint=HINT) from error
