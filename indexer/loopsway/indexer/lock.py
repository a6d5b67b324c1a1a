"""One writer at a time: whoever builds or changes an index holds its lock."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

LOCK = "writer.lock"


class IndexLockedError(RuntimeError):
    """Another process is writing to the index."""


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Holds the lock of the index in this folder; the system frees it when the process ends, however it ends.

    Raises:
        IndexLockedError: another process holds it; the text says which, where and since when.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IndexLockedError(
                f"{path} is being written by {_holder(path / LOCK)}; wait until it is done, or stop it"
            ) from None
        file.truncate(0)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        file.write(json.dumps(holder))
        file.flush()
        yield


def _holder(file: Path) -> str:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return f"process {data['pid']} on {data['host']}, since {data['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
