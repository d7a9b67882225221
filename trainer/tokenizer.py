"""Text to token ids with a tiktoken file: Llama 3's split pattern and its 256 special tokens."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from functools import cached_property
from importlib import resources

import fsspec
import numpy as np
import numpy.typing as npt
import tiktoken

from orchestrator.worker import MisconfiguredError
from trainer.finding import is_no_file

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: the tokenizer of the Llama 3 release."""
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
"""Their ids follow the last rank of the file, in this order. Source: the same."""
FILE_BYTES_MAX = 64 << 20
PIECE_CHARS_MAX = 400_000
"""Longer texts are cut into such pieces: tiktoken's regular expressions recurse."""
_NO_TEXT = re.compile("([\udc80-\udcff]+)")
"""Bytes that are not UTF-8, as Python's `surrogateescape` has them."""
_WHERE = "spec.trainer.tokenizer"


class Tokenizer:
    """A vocabulary. Reading it is fast; the encoder is built only once it is needed.

    Attributes:
        size: ids that it can give, special tokens included.
        bos: id that begins a document.
        eos: id that ends one.
        digest: SHA-256 of its file.
    """

    def __init__(self, content: bytes, where: str = "") -> None:
        self._content, self._where = content, where
        ranks = content.count(b"\n") + (not content.endswith(b"\n"))
        self.size = ranks + len(SPECIAL_TOKENS)
        self.bos, self.eos = ranks, ranks + 1
        self.digest = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of a text; what looks like a special token in it is plain text."""
        pieces = [
            self._encoding.encode_to_numpy(
                text[at : at + PIECE_CHARS_MAX], allowed_special=set(), disallowed_special=()
            )
            for at in range(0, len(text), PIECE_CHARS_MAX)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def encode_bytes(self, content: bytes) -> npt.NDArray[np.uint32]:
        """Return the ids of any bytes: those of the text that they are, a byte each where not."""
        text = content.decode("utf-8", "surrogateescape")
        pieces = [
            self._byte_ids[np.frombuffer(piece.encode("utf-8", "surrogateescape"), np.uint8)]
            if _NO_TEXT.match(piece)
            else self.encode(piece)
            for piece in _NO_TEXT.split(text)
        ]
        return np.concatenate(pieces)

    def decode(self, ids: npt.NDArray[np.uint32]) -> str:
        """Return the text of ids; what is no text in it is shown as such."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: npt.NDArray[np.uint32]) -> bytes:
        """Return the bytes of ids.

        Raises:
            ValueError: if there is no such id.
        """
        if len(ids) and int(ids.max()) >= self.size:
            raise ValueError(f"id is {int(ids.max())}, expected less than {self.size}")
        return self._encoding.decode_bytes([int(i) for i in ids])

    @cached_property
    def _byte_ids(self) -> npt.NDArray[np.uint32]:
        single = self._encoding.encode_single_token
        return np.array([single(bytes([byte])) for byte in range(256)], np.uint32)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = _parse(self._content, self._where)
        special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return tiktoken.Encoding(
            self.digest,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special,
            explicit_n_vocab=self.size,
        )


def open_tokenizer(address: str | None, vocab: int) -> Tokenizer:
    """Read a tokenizer and check that the model has an embedding for each of its ids.

    Args:
        address: a file in tiktoken format, as path or fsspec address; None for the small one.
        vocab: size of the model's vocabulary.

    Raises:
        MisconfiguredError: if there is no such file, or the vocabulary is too small for it.
    """
    tokenizer = Tokenizer(_read(address), address or "small.tiktoken")
    if tokenizer.size > vocab:
        raise MisconfiguredError(
            f"{_WHERE} has {tokenizer.size} ids, the model's vocabulary {vocab}: "
            f"{address or 'the small tokenizer'}",
            hint=f"give the model `vocab: {tokenizer.size}`, or choose another tokenizer",
        )
    return tokenizer


def _read(address: str | None) -> bytes:
    if address is None:
        return (resources.files("trainer.assets") / "small.tiktoken").read_bytes()
    try:
        content = _content(address)
    except (OSError, ValueError, ImportError) as error:
        raise _no_file(address, str(error)) from error
    except Exception as error:
        # As for the text: what one of fsspec's schemes makes of a bad address is its own affair.
        raise _no_file(address, f"{type(error).__name__}: {error}") from error
    if not content or len(content) > FILE_BYTES_MAX:
        raise _not_tiktoken(f"{len(content)} bytes, expected 1 to {FILE_BYTES_MAX}", address)
    return content


def _content(address: str) -> bytes:
    files, path = fsspec.core.url_to_fs(address)
    if is_no_file(files, path):
        raise ValueError("what is there is no file")
    with files.open(path, "rb") as file:
        content: bytes = file.read(FILE_BYTES_MAX + 1)
    return content


def _no_file(address: str, why: str) -> MisconfiguredError:
    return MisconfiguredError(
        f"{_WHERE} is {address!r}, expected a file in tiktoken format: {why}",
        hint="leave it out to use the small tokenizer that comes with holdfast",
    )


def _parse(content: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise _not_tiktoken(f"line {number + 1} is {line[:40]!r}", where) from None
    if sorted(ranks.values()) != list(range(content.count(b"\n") + (content[-1:] != b"\n"))):
        raise _not_tiktoken("ranks are not 0, 1, 2, ..., each once", where)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise _not_tiktoken("not every single byte is a token", where)
    return ranks


def _not_tiktoken(found: str, where: str) -> MisconfiguredError:
    return MisconfiguredError(
        f"{_WHERE}: {found}: {where}",
        hint="a tiktoken file has a token in base64, a space and its rank on every line",
    )
