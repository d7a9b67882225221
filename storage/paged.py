"""Takes memory that begins with a page, so that stores may move it past the page cache."""

import contextlib
import mmap


def paged(size: int) -> memoryview:
    """Return so many writable bytes of memory, aligned to a page; they are zero.

    Memory that is not touched takes no room. The kernel is asked for large pages: to find, clear
    and map small ones takes 0.3 s for each gigabyte.
    """
    # An empty map is refused.
    held = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without
        held.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(held)[:size]
