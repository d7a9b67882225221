"""Where a node keeps compiled kernels, and what becomes of those whose compiler was killed.

Inductor keeps them in a folder for processes to come, and takes what is there for whole. A linker
that is killed leaves an empty library, or a part of one, and every later process would end with
`file too short` where it wants that kernel. They are looked for before a generation begins, and not
when one can not be loaded: then a pass is half done, and peers wait in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""The folder; torch sets it to one of its own, for all runs of a user, unless the user has."""
_ELF = struct.Struct("<4sBB34xQ10xHH")
"""Of a header: magic, bits, byte order, where the table of sections is, and its entries."""
_64_BITS, _LITTLE_ENDIAN = 2, 1


def keep_in(cache_dir: str) -> None:
    """Keep kernels in this folder of the node, unless the user names one; clear torn ones out.

    Args:
        cache_dir: as in `Seat`; "" leaves kernels where torch keeps them.
    """
    default = default_cache_dir()
    if cache_dir and os.environ.get(VARIABLE, default) == default:
        os.environ[VARIABLE] = str(Path(cache_dir, "kernels").absolute())
    if os.environ.get(VARIABLE, default) != default:
        clear_torn(Path(os.environ[VARIABLE]))


def clear_torn(folder: Path) -> list[Path]:
    """Remove libraries that are not whole and that nobody is making just now; return them.

    Whoever makes one holds its lock, and the kernel of the system lets go of a dead one's.
    """
    torn = []
    for path in sorted(folder.glob("*/*.so")):
        with contextlib.suppress(FileNotFoundError):  # another rank of this node removed it
            if not is_whole(path) and _removed(path, folder / "locks"):
                torn.append(path)
    return torn


def _removed(path: Path, locks: Path) -> bool:
    locks.mkdir(exist_ok=True)
    with (locks / f"{path.name.partition('.')[0]}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # it is being made
        if is_whole(path):  # by now
            return False
        path.unlink()
        return True


def is_whole(library: Path) -> bool:
    """Whether a library has all its bytes.

    The table of sections ends the file, and where it lies stands at the beginning. Source: ELF-64.
    """
    with library.open("rb") as file:
        head = file.read(_ELF.size)
        size = os.fstat(file.fileno()).st_size
    if len(head) < _ELF.size:
        return False
    magic, bits, order, table, entry, entries = _ELF.unpack(head)
    if magic != b"\x7fELF":
        return False
    if (bits, order) != (_64_BITS, _LITTLE_ENDIAN):
        return True  # as far as can be told here
    return bool(table and entries) and int(table + entry * entries) <= size
