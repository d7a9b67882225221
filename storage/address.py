"""Opens the store at an address: a folder or a bucket, encrypted or not.

An address never holds a secret, since it stands in run files, journals and logs. Credentials and
keys come from the environment of whoever opens the store.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from storage.blob import BlobStore, validate_key
from storage.errors import UnsupportedUriError
from storage.local import LocalStore

KEY_BYTES = 32

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_S3_OPTIONS = ("endpoint", "region", "checksum", "connections", "part", "encrypt")
_FILE_OPTIONS = ("encrypt",)
_MIB = 1024 * 1024


def open_store(uri: str, environment: Mapping[str, str] = os.environ) -> BlobStore:
    """Return the store at an address; nothing is read or written, nobody is connected to.

    ====================  ==========================================================================
    address               is
    ====================  ==========================================================================
    /path, path           a folder
    file:///path          the same
    s3://bucket/prefix    object storage that speaks S3 and honours If-None-Match
    ====================  ==========================================================================

    Options follow after a question mark:

    - `encrypt=NAME`: every blob is encrypted with the key that the environment variable NAME holds,
      32 bytes in base64. Also for file:///path.
    - `endpoint=URL`, `region=NAME`: of a bucket that is not on AWS; else as the environment says.
    - `checksum=when_required`: for stores that choke on the checksums that S3 clients send.
    - `connections=N`, `part=N`: connections in all, and MiB of each part of a large blob.

    Args:
        uri: the address.
        environment: where keys come from. Credentials of a bucket come from where AWS's own tools
            look for them.

    Raises:
        UnsupportedUriError: if the scheme or an option is unknown, a host is named, there is a
            password in it, what would be a folder here was meant as something else ("file:/path",
            "s3:bucket", "~/path"), or what it takes is not installed.
    """
    _require_no_secret(uri)
    if "://" not in uri:
        _require_path(uri)
        return LocalStore(Path(uri))
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        options = _options(parts, _FILE_OPTIONS)
        store: BlobStore = LocalStore(Path(unquote(parts.path)))
    elif parts.scheme == "s3":
        options = _options(parts, _S3_OPTIONS)
        store = _open_s3(parts, options)
    else:
        raise UnsupportedUriError(
            f"address is {_bare(parts)}, supported are a folder, file:///folder and s3://bucket"
        )
    return _encrypted(store, options["encrypt"], environment) if "encrypt" in options else store


def _require_no_secret(uri: str) -> None:
    """Refuse an address with a name or password, however it is put, without repeating any of it.

    What is wrong with an address is logged. Keys have slashes in them, so that it takes more than
    to look before the host; only the names of folders may have an @.
    """
    scheme = _SCHEME.match(uri)
    folder = scheme is None or scheme[0].lower() == "file:"
    host = uri.partition("://")[2].partition("/")[0]
    if "@" in (host if folder else uri):
        raise UnsupportedUriError(
            "address has a name or password in it, expected credentials in the environment"
        )


def _require_path(uri: str) -> None:
    """Refuse what was meant as another kind of address, and would become a folder of that name."""
    if not uri.strip():
        raise UnsupportedUriError("address is empty, expected a folder or a bucket")
    if uri.startswith("~"):
        raise UnsupportedUriError(
            f"address is {uri}, expected the home folder written out, as /home/me; "
            f"a folder of that very name is ./{uri}"
        )
    if scheme := _SCHEME.match(uri):
        rest = uri[scheme.end() :]
        meant = f"file://{rest}" if rest.startswith("/") else "/folder or file:///folder"
        if scheme[0].lower() == "s3:":
            meant = "s3://bucket/prefix"
        raise UnsupportedUriError(
            f"address is {uri}, expected {meant}; a folder of that very name is ./{uri}"
        )


def _options(parts: SplitResult, known: tuple[str, ...]) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    for name in options:
        if name not in known:
            raise UnsupportedUriError(
                f"option {name!r} is unknown, expected one of {', '.join(known)}: {_bare(parts)}"
            )
    if len(options) != len(pairs):
        raise UnsupportedUriError(f"an option is given twice: {_bare(parts)}")
    if parts.fragment:
        raise UnsupportedUriError(f"address has a # in it: {_bare(parts)}")
    return options


def _open_s3(parts: SplitResult, options: Mapping[str, str]) -> BlobStore:
    bucket, root = parts.netloc, unquote(parts.path).strip("/")
    if not _BUCKET.fullmatch(bucket):
        raise UnsupportedUriError(f"no bucket has the name {bucket!r}: {_bare(parts)}")
    try:
        if root:
            validate_key(root)
    except ValueError as error:
        raise UnsupportedUriError(f"prefix can not be used: {error}") from None
    try:
        from storage.remote import Connection, open_s3  # noqa: PLC0415 - an extra, for who needs it
    except ImportError as error:
        raise UnsupportedUriError(
            f"{_bare(parts)} needs s3fs, which is not installed; expected `pip install "
            f"'holdfast[s3]'` ({error})"
        ) from error
    connection = Connection(
        endpoint=_endpoint(options.get("endpoint"), parts),
        region=options.get("region"),
        checksum=_checksum(options.get("checksum", "when_supported"), parts),
        connections=_number(options.get("connections", "64"), "connections", (1, 4096), parts),
        part_bytes=_number(options.get("part", "32"), "part", (5, 5120), parts) * _MIB,
    )
    return open_s3(bucket, root, connection)


def _endpoint(url: str | None, parts: SplitResult) -> str | None:
    if url is None:
        return None
    found = urlsplit(url)
    if found.scheme not in {"http", "https"} or not found.hostname or found.username is not None:
        raise UnsupportedUriError(
            f"endpoint must be http://host:port or https://host:port, without credentials: "
            f"{_bare(parts)}"
        )
    return url


def _checksum(name: str, parts: SplitResult) -> Literal["when_supported", "when_required"]:
    if name == "when_supported":
        return "when_supported"
    if name == "when_required":
        return "when_required"
    raise UnsupportedUriError(
        f"checksum is {name!r}, expected when_supported or when_required: {_bare(parts)}"
    )


def _number(text: str, name: str, limits: tuple[int, int], parts: SplitResult) -> int:
    low, high = limits
    if not text.isdecimal() or len(text) > 6 or not low <= int(text) <= high:
        raise UnsupportedUriError(
            f"{name} is {text[:20]!r}, expected a whole number from {low} to {high}: {_bare(parts)}"
        )
    return int(text)


def _encrypted(store: BlobStore, name: str, environment: Mapping[str, str]) -> BlobStore:
    try:
        key = base64.b64decode(environment[name], validate=True)
    except KeyError:
        raise _no_key(f"encrypt is {name!r}, and there is no such variable") from None
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        # Neither the text nor its length in bytes: it may be a good key, mistyped.
        raise _no_key(
            f"variable {name} must hold {KEY_BYTES} bytes in base64, as `openssl rand -base64 "
            f"{KEY_BYTES}` prints them"
        )
    try:
        from storage.encrypted import EncryptedStore  # noqa: PLC0415 - an extra, for who needs it
    except ImportError as error:
        raise UnsupportedUriError(
            f"encryption needs cryptography, which is not installed; expected `pip install "
            f"'holdfast[encryption]'` ({error})"
        ) from error
    return EncryptedStore(store, key)


def _no_key(message: str) -> UnsupportedUriError:
    """Return the error for a store that is well addressed, and has no key here."""
    error = UnsupportedUriError(message)
    error.hint = "Put the key into the environment with which the store was, or is to be, written."
    return error


def _bare(parts: SplitResult) -> str:
    """Return an address without its options, for messages."""
    return f"{parts.scheme}://{parts.netloc}{parts.path}"
