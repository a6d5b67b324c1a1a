"""A folder of this machine that keeps files of object stores, each fetched once, up to a number of bytes.

Files are named by their digests. What was used least recently goes first, but never a file that this process reads.
Several processes may share the folder.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .folders import IndexDamagedError, StorageError

FOLDER_VARIABLE, BYTES_VARIABLE = "LOOPSWAY_CACHE", "LOOPSWAY_CACHE_BYTES"
DEFAULT_BYTES = 32 << 30
STALE_S = 24 * 3600  # after which a fetch that did not end is a dead process's


@functools.cache
def _cache(folder: Path, limit_bytes: int) -> Cache:
    """One for all who use the folder: each knows what the others read."""
    return Cache(folder, limit_bytes)


class Cache:
    """A bounded folder of files.

    Args:
        folder: made when it is first needed.
        limit_bytes: of all files in it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._kept: Counter[str] = Counter()  # files that objects of this process read
        self._sound: set[str] = set()  # whose digests this process has compared

    @staticmethod
    def from_environment() -> Cache:
        """This process's cache in LOOPSWAY_CACHE (else the user's cache folder), of LOOPSWAY_CACHE_BYTES (else 32 GiB).

        Raises:
            ValueError: LOOPSWAY_CACHE_BYTES is not a positive number.
        """
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        text = os.environ.get(BYTES_VARIABLE) or str(DEFAULT_BYTES)
        if not text.isdecimal() or not int(text):
            raise ValueError(f"{BYTES_VARIABLE} is {text!r}, expected a positive number of bytes, such as 34359738368")
        return _cache(Path(os.environ.get(FOLDER_VARIABLE) or home / "loopsway"), int(text))

    @contextmanager
    def holding(
        self,
        digest: str,
        size_bytes: Callable[[], int],
        fetch: Callable[[Path], None],
        digest_of: Callable[[Path], str],
        name: str,
    ) -> Iterator[Path]:
        """The file of this digest, which no process removes while the context lasts; fetched if it is not there.

        Args:
            digest: of the file.
            size_bytes: what it takes; asked, as is `fetch`, only when it is not there.
            fetch: writes it to a path.
            digest_of: compared before the file is used first in this process.
            name: of where it comes from, for the error.

        Raises:
            IndexDamagedError: what is fetched has another digest.
            StorageError: it does not fit.
        """
        file = self.folder / digest
        while True:
            with self._lock(fcntl.LOCK_SH):
                if self._is_sound(file, digest, digest_of):
                    os.utime(file)
                    yield file
                    return
            with self.new_file() as fetched:
                with self._lock(fcntl.LOCK_EX):
                    self._make_room(size_bytes(), fetched)
                fetch(fetched)
                if digest_of(fetched) != digest:
                    raise IndexDamagedError(f"{name} is damaged: it does not match its digest; `loopsway verify`")
                self.add(fetched, digest)

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """A path for a file that is to be added; what is left there afterwards is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def add(self, file: Path, digest: str) -> None:
        """Moves a sound file into the cache.

        Raises:
            StorageError: it does not fit beside what this process reads.
        """
        with self._lock(fcntl.LOCK_EX):
            self._make_room(file.stat().st_size, file)
            file.replace(self.folder / digest)
            self._sound.add(digest)

    def keep(self, file: Path, holder: object) -> None:
        """Keeps a file while this object lives."""
        self._kept[file.name] += 1
        weakref.finalize(holder, self._kept.subtract, [file.name])

    def _is_sound(self, file: Path, digest: str, digest_of: Callable[[Path], str]) -> bool:
        if not file.exists():
            return False
        if digest not in self._sound:
            if digest_of(file) != digest:
                file.unlink()
                return False
            self._sound.add(digest)
        return True

    def _make_room(self, size_bytes: int, added: Path) -> None:
        oldest_first = sorted(self._entries())
        used = sum(size for _, size, name in oldest_first if name != added.name)
        now = time.time()
        for modified, size, name in oldest_first:
            if name.endswith(".partial"):
                removable = name != added.name and now - modified > STALE_S
            else:
                removable = used + size_bytes > self.limit_bytes and self._kept[name] <= 0
            if removable:
                (self.folder / name).unlink(missing_ok=True)
                used -= size
        if used + size_bytes > self.limit_bytes:
            raise StorageError(
                errno.ENOSPC,
                f"the cache {self.folder} holds at most {self.limit_bytes:,} bytes; {used:,} are read by open indices "
                f"or being fetched, and {size_bytes:,} more are needed: set {BYTES_VARIABLE} higher",
            )

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, size and name of each file."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # what another process fetched has got its name meanwhile
                    if entry.name != ".lock":
                        facts = entry.stat()
                        yield facts.st_mtime, facts.st_size, entry.name

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, how)
            yield
