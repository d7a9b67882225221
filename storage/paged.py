"""Takes memory that begins with a page, so that a store may write it past the page cache."""

import mmap


def paged(size: int) -> memoryview:
    """Return so many writable bytes of memory, aligned to a page; they are zero.

    Memory that is not touched takes no room.
    """
    # An empty map is refused.
    held = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(held)[:size]
