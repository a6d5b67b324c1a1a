"""`loopsway`, which writes how many bytes of memory it has in use to a file whenever it gets SIGUSR1.

python watched_server.py FILE serve ...
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

from loopsway.service.freed_memory import MallocInfo

# To the process that is watched: all of its memory comes from the C library, which tells what is in use.
ENVIRONMENT = {"PYTHONMALLOC": "malloc", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def used_bytes() -> int:
    """Of this process."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd


def tell_used_bytes(file: Path) -> None:
    """At once or not at all, for who reads it meanwhile."""
    unready = file.with_suffix(".unready")
    unready.write_text(str(used_bytes()))
    os.replace(unready, file)


if __name__ == "__main__":
    from loopsway.cli.main import main

    told = Path(sys.argv.pop(1))
    signal.signal(signal.SIGUSR1, lambda *_: tell_used_bytes(told))
    main()
