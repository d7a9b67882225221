"""Encrypts blobs on their way to a store, block by block, so that a range can be read alone.

A blob is a header and then blocks of AES-256-GCM, each with its tag. Each blob has a key of its
own, derived from the store's key and a random salt, so that a block's number can be its nonce. The
last block's nonce is marked as last, which makes a blob that was cut short at a block's edge
unreadable, and the blob's name is authenticated with every block, so that none can stand in for
another.

Source: the construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO 2015).
"""

import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from storage.blob import BlobStore, LeftOver, Sweepable, validate_key, validate_range
from storage.digest import BLOCK_BYTES, Buffer, byte_view
from storage.errors import BlobCorruptError, WrongKeyError

MAGIC = b"HFENC\x00\x00\x01"
SALT_BYTES = 16
ID_BYTES = 8
HEADER_BYTES = len(MAGIC) + ID_BYTES + SALT_BYTES
TAG_BYTES = 16
KEY_BYTES = 32


class EncryptedStore:
    """A `BlobStore` whose inner store sees names, and sizes to within a few bytes; nothing else.

    Args:
        inner: the store that does the work.
        key: 32 bytes. Who loses it loses every blob.
        block_bytes: of plain text in a block; part of the format of a store, the same for all its
            readers and writers.
    """

    def __init__(self, inner: BlobStore, key: bytes, *, block_bytes: int = BLOCK_BYTES) -> None:
        if len(key) != KEY_BYTES or block_bytes < 1:
            raise ValueError(f"key must have {KEY_BYTES} bytes, blocks at least one")
        self.inner = inner
        self._key, self._block_bytes = key, block_bytes
        self._id = _derive(key, b"", b"holdfast key id", ID_BYTES)

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        validate_key(key)
        view = byte_view(data)
        salt = os.urandom(SALT_BYTES)
        cipher = _Cipher(self._key, salt, key)
        last = max(-(-len(view) // self._block_bytes) - 1, 0)
        blob = bytearray(MAGIC + self._id + salt)
        for number in range(last + 1):
            at = number * self._block_bytes
            blob += cipher.lock(view[at : at + self._block_bytes], number, last=number == last)
        self.inner.put(key, blob)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`.

        Raises:
            BlobCorruptError: if what is stored is not what was put under this key.
            WrongKeyError: if it was encrypted with another key.
        """
        validate_range(start, length)
        size = self.size(key)
        end = size if length is None else min(start + length, size)
        if start >= end and (size or start):
            return b""
        first, beyond = start // self._block_bytes, -(-max(end, 1) // self._block_bytes)
        cipher = self._cipher(key)
        stride = self._block_bytes + TAG_BYTES
        locked = self.inner.get(key, HEADER_BYTES + first * stride, (beyond - first) * stride)
        last = max(-(-size // self._block_bytes) - 1, 0)
        plain = bytearray()
        for number in range(first, beyond):
            at = (number - first) * stride
            block = locked[at : at + stride]
            plain += cipher.unlock(block, number, last=number == last)
        skip = first * self._block_bytes
        return bytes(memoryview(plain)[start - skip : end - skip])

    def size(self, key: str) -> int:
        """See `BlobStore.size`.

        Raises:
            BlobCorruptError: if no blob of ours has the size of what is stored.
        """
        stored = self.inner.size(key) - HEADER_BYTES
        blocks = -(-stored // (self._block_bytes + TAG_BYTES))
        size = stored - blocks * TAG_BYTES
        if blocks < 1 or size < 0 or (size == 0 and blocks > 1):
            raise BlobCorruptError(f"{stored + HEADER_BYTES} bytes are no encrypted blob: {key}")
        return size

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        return self.inner.keys(prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self.inner.delete(key)

    def left_over(self, idle_s: float) -> Sequence[LeftOver]:
        """See `Sweepable.left_over`."""
        return self.inner.left_over(idle_s) if isinstance(self.inner, Sweepable) else []

    def sweep_old(self, idle_s: float) -> Sequence[LeftOver]:
        """See `Sweepable.sweep_old`."""
        return self.inner.sweep_old(idle_s) if isinstance(self.inner, Sweepable) else []

    def _cipher(self, key: str) -> "_Cipher":
        header = self.inner.get(key, 0, HEADER_BYTES)
        found = header[len(MAGIC) : len(MAGIC) + ID_BYTES]
        if header[: len(MAGIC)] != MAGIC or len(header) != HEADER_BYTES:
            raise BlobCorruptError(f"header is not that of an encrypted blob: {key}")
        if found != self._id:
            raise WrongKeyError(
                f"encrypted with key {found.hex()}, the one given is {self._id.hex()}: {key}"
            )
        return _Cipher(self._key, header[-SALT_BYTES:], key)


class _Cipher:
    """Locks and unlocks the blocks of one blob."""

    def __init__(self, key: bytes, salt: bytes, name: str) -> None:
        self._name = name
        self._aead = AESGCM(_derive(key, salt, b"holdfast blob", KEY_BYTES))

    def lock(self, block: Buffer, number: int, *, last: bool) -> bytes:
        """Return a block encrypted, with its tag."""
        return self._aead.encrypt(_nonce(number, last=last), block, self._name.encode())

    def unlock(self, block: bytes, number: int, *, last: bool) -> bytes:
        """Return a block decrypted.

        Raises:
            BlobCorruptError: if it is not the block that was locked.
        """
        try:
            return self._aead.decrypt(_nonce(number, last=last), block, self._name.encode())
        except (InvalidTag, ValueError):
            raise BlobCorruptError(
                f"block {number} does not have its tag, it was changed or cut: {self._name}"
            ) from None


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _derive(key: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=purpose).derive(key)
