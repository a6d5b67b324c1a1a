"""One writer at a time: whoever builds or changes an index holds its lock.

On a file system the lock is the system's, and ends with the process. On an object store it is a *lease*: a file that
its holder, and it alone, writes anew all the time; when it stays the same for `LEASE_S` its holder is gone. That
compares no clocks. (C. Gray, D. Cheriton: "Leases", SOSP 1989; conditional PUTs for the file.)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

from .folders import Folder, LocalFolder, StorageError

LOCK = "writer.lock"
LEASE_S = 30.0
RENEWALS = 6  # in a lease

_log = logging.getLogger(__name__)


class IndexLockedError(RuntimeError):
    """Another process is writing to the index."""


@runtime_checkable
class ConditionalFolder(Protocol):
    """A folder, of an object store, with conditional writes of whole files; their tags change with their content."""

    def create(self, name: str, content: bytes) -> str: ...  # FileExistsError
    def replace(self, name: str, content: bytes, tag: str) -> str: ...  # FileExistsError
    def read_tagged(self, name: str) -> tuple[bytes, str]: ...  # FileNotFoundError
    def remove(self, names: Iterable[str]) -> None: ...


@contextmanager
def writer_lock(folder: Folder) -> Iterator[Callable[[], None]]:
    """Holds the lock of the index in this folder.

    Yields:
        What to call before something is published or removed: it raises IndexLockedError if the lock was lost, as by
        a process that slept longer than its lease.

    Raises:
        IndexLockedError: another process holds it; the text says which, where and since when.
    """
    if isinstance(folder, LocalFolder):
        with _file_lock(folder):
            yield lambda: None
    else:
        assert isinstance(folder, ConditionalFolder)
        lease = Lease(folder)
        lease.take()
        try:
            yield lease.confirm
        finally:
            lease.end()


@contextmanager
def _file_lock(folder: LocalFolder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(folder, (folder.path / LOCK).read_bytes()) from None
        file.truncate(0)
        file.write(json.dumps(_myself()))
        file.flush()
        yield


class Lease:
    """A lock that has to be renewed, and is while this process runs.

    Args:
        folder: an object store's, with conditional writes.
    """

    def __init__(self, folder: ConditionalFolder) -> None:
        self._folder = folder
        self._facts = _myself() | {"id": uuid.uuid4().hex}
        self._tag = ""
        self._renewed = 0.0
        self._is_lost = False
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_all_the_time, name="loopsway-lease", daemon=True)

    def take(self) -> None:
        """Takes the lock, from a holder that is gone if need be.

        Raises:
            IndexLockedError: its holder is not gone.
        """
        while not self._tag:
            try:
                self._write(lambda content: self._folder.create(LOCK, content))
            except FileExistsError:
                with suppress(FileNotFoundError):  # its holder was done just now
                    self._take_over()
        self._thread.start()

    def confirm(self) -> None:
        """Renews the lease.

        Raises:
            IndexLockedError: it was lost.
        """
        self._renew()
        if self._is_lost:
            raise IndexLockedError(
                f"the lock of {self._folder} was lost, as this process was held up for more than {LEASE_S:g} s, and "
                "another may be writing there now; run the same command to go on"
            )

    def end(self) -> None:
        """Frees the lock, unless it was lost."""
        self._ended.set()
        self._thread.join()
        self._renew()
        if not self._is_lost:
            with suppress(StorageError):  # it runs out by itself
                self._folder.remove([LOCK])

    def _take_over(self) -> None:
        """Waits until the lease of its holder has run out, which did not renew it, and takes the lock."""
        holder, tag = self._folder.read_tagged(LOCK)
        _log.warning("%s; waiting up to %g s to see whether it still is", _locked(self._folder, holder), LEASE_S)
        begin = time.monotonic()
        while time.monotonic() - begin < LEASE_S:
            time.sleep(LEASE_S / RENEWALS / 2)
            now, tag_now = self._folder.read_tagged(LOCK)
            if tag_now != tag:
                raise _locked(self._folder, now)
        try:
            self._write(lambda content: self._folder.replace(LOCK, content, tag))
        except FileExistsError:
            raise _locked(self._folder, self._folder.read_tagged(LOCK)[0]) from None

    def _renew_all_the_time(self) -> None:
        while not self._ended.wait(LEASE_S / RENEWALS):
            self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._is_lost:
                return
            try:
                self._write(lambda content: self._folder.replace(LOCK, content, self._tag))
            except FileExistsError:
                self._is_lost = True
            except StorageError:  # perhaps the next one gets through
                self._is_lost = time.monotonic() - self._renewed > LEASE_S

    def _write(self, write: Callable[[bytes], str]) -> None:
        """Writes the file; one that got through, and whose answer was lost, counts.

        Raises:
            FileExistsError: it is another's.
        """
        begin = time.monotonic()
        try:
            self._tag = write(self._content())
        except FileExistsError:
            try:
                content, tag = self._folder.read_tagged(LOCK)
            except FileNotFoundError:
                content, tag = b"", ""
            if _id(content) != self._facts["id"]:
                raise
            self._tag = tag
        self._renewed = begin

    def _content(self) -> bytes:
        return json.dumps(self._facts | {"renewed": datetime.now(UTC).isoformat(), "nonce": uuid.uuid4().hex}).encode()


def _myself() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}


def _id(holder: bytes) -> object:
    try:
        return json.loads(holder)["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _locked(folder: object, holder: bytes) -> IndexLockedError:
    try:
        data = json.loads(holder)
        who = f"process {data['pid']} on {data['host']}, since {data['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"  # which has not written its name yet
    return IndexLockedError(f"{folder} is being written by {who}; wait until it is done, or stop it")
