"""Memory that was freed goes back to the system. The server and its model process start this, each for itself.

glibc keeps freed blocks for later, in arenas that its threads share out, and gives back by itself only what lies at an
arena's end: what a burst of requests leaves below a block that lives on stays resident. `malloc_trim` gives every whole
page back, for milliseconds of a processor, and the next request pays for fresh pages. So it is called only where much
has gathered, which takes a load: a lone caller's server does not get there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

PERIOD_S = 5.0  # between two looks
SLACK_BYTES = 32 << 20  # of freed memory that is kept

_STATM = Path("/proc/self/statm")


class MallocInfo(ctypes.Structure):
    """glibc's mallinfo2, over all arenas; hblkhd is what lies outside of them."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def give_back_freed_memory() -> None:
    """Does so from now on, in a thread that ends with the process; nothing where the C library is no glibc (2.33)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2") and _STATM.exists():
        library.mallinfo2.restype = MallocInfo
        threading.Thread(target=_watch, args=[library], name="freed-memory", daemon=True).start()


def _watch(library: ctypes.CDLL) -> None:
    rest = 0  # what a trim leaves of it: Python's small objects, libraries' data, stacks, parts of pages
    while True:
        time.sleep(PERIOD_S)
        if _beside_use(library) > rest + SLACK_BYTES:
            library.malloc_trim(0)
            rest = _beside_use(library)
        else:
            rest = min(rest, _beside_use(library))


def _beside_use(library: ctypes.CDLL) -> int:
    """Bytes of resident memory that no file backs, without malloc's blocks in use."""
    info = library.mallinfo2()
    _, resident, shared, *_ = map(int, _STATM.read_text().split())  # pages
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - info.uordblks - info.hblkhd
