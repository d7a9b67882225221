"""A tensor as a range of bytes in a file, and the checks before any memory is taken for it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.worker import MisconfiguredError
from trainer.weights.files import Folder
from trainer.weights.names import Shape

DAMAGED = "the file was damaged or cut short: copy it again"


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, row after row."""
    flat: npt.NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return flat.data


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A tensor in a file, row after row.

    Attributes:
        start: first byte in the file.
        crc: CRC-32 of all its bytes, if somebody wrote it down.
    """

    folder: Folder
    file: str
    start: int
    shape: Shape
    dtype: torch.dtype
    crc: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> Tensor:
        """Read these rows.

        Raises:
            MisconfiguredError: if the file is too short or, reading all of it, if its CRC differs.
        """
        tensor = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
        if not tensor.numel():
            return tensor
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        view = bytes_of(tensor)
        self.folder.fill(self.file, self.start + first * row, view)
        if self.crc is not None and count == self.shape[0] and zlib.crc32(view) != self.crc:
            raise MisconfiguredError(
                f"crc32 of a tensor is {zlib.crc32(view):08x}, the file says {self.crc:08x}: "
                f"{self.folder.where(self.file)}",
                hint=DAMAGED,
            )
        return tensor
