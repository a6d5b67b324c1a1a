"""Serves the small index for tests of memory: `python memory_server.py INDEX READY_FILE FREED_BYTES HELD_S`.

The server and its model process begin by leaving so much memory freed. At SIGUSR1 the server reads nothing for so long.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from tiny_task import __file__ as task_file
from tiny_task import leave_freed

from loopsway.service import IndexSettings, Settings, serve

if __name__ == "__main__":
    index, ready, size_bytes, held_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    kept = leave_freed(size_bytes)
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(held_s))  # in the thread of the event loop
    task = IndexSettings(path=index, task=f"{task_file}:TinyTask", task_arguments={"freed_bytes": size_bytes})
    serve(Settings(indices=(task,), port=0, receive_window_bytes=64 << 10), ready_file=ready)
