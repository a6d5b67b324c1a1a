"""Where an index's files lie: a `Folder` on this machine, or a prefix in a bucket of an object store (s3_folder.py).

Files are named by their paths below the folder, with slashes. A reader finds a file whole, as it was before, or not.
"""

from __future__ import annotations

import errno
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .files import bytes_digest, file_digest, sync, write_whole

FileFacts = Mapping[str, Any]  # size_bytes and digest

_UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


class StorageError(OSError):
    """The index's folder can't be written to, or reached."""


class IndexDamagedError(ValueError):
    """A part of the index is missing, unreadable or not what its manifest says."""


class Folder(ABC):
    """A folder of files, on this machine or elsewhere.

    Attributes:
        address: what opens it again, in any process: an absolute path, or a URL.
        is_local: its files can be read in place.
    """

    address: str
    is_local: bool

    def __str__(self) -> str:
        return self.address

    @abstractmethod
    def __truediv__(self, name: str) -> Folder:
        """A folder below this one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole and durably, whatever was there before."""

    @abstractmethod
    def write_file(self, name: str, write: Callable[[Path], object]) -> FileFacts:
        """`write` of a file that `write(path)` makes at a path of this machine."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The size in bytes of each of these files; None for those that are not there."""

    @abstractmethod
    def files(self, below: str = "") -> list[str]:
        """Names of all files below a folder, sorted; none if there is no such folder."""

    @abstractmethod
    def folders(self, below: str) -> list[str]:
        """Names of the folders that lie in a folder and have files, at whatever depth; sorted."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Removes files."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it."""

    @abstractmethod
    def make_durable(self, names: Iterable[str]) -> None:
        """Lets files that were written through `arrays` outlast a power failure."""

    @abstractmethod
    def digest(self, name: str) -> str:
        """`file_digest` of a file, read now."""

    @abstractmethod
    def local(
        self, name: str, digest: Callable[[], str], digest_of: Callable[[Path], str] = file_digest
    ) -> AbstractContextManager[Path]:
        """A file as one of this machine, to be opened while the context lasts; what has opened it may go on after.

        Args:
            name: of the file.
            digest: of its content; called only when the file comes from elsewhere, and is compared then.
            digest_of: the digest of a file's content.

        Raises:
            IndexDamagedError: the file is not there, or has another digest.
        """

    @abstractmethod
    def keep(self, file: Path, holder: object) -> None:
        """Keeps a file that `local` gave for as long as this object lives, which reads it."""

    @abstractmethod
    def arrays(self, name: str) -> Any:
        """The place of a Zarr group, as `zarr.open_group` takes it."""

    @abstractmethod
    def clear_errors(self) -> AbstractContextManager[None]:
        """Turns what Zarr raises when the store can't be reached into StorageError."""

    def at(self, name: str) -> str:
        """Where a file lies, for people."""
        return f"{self.address}/{name}"


class LocalFolder(Folder):
    """A folder of this machine, or of a file system that it has mounted.

    Args:
        path: it need not exist yet.
    """

    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = str(path.absolute())

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def at(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)

    def write_file(self, name: str, write: Callable[[Path], object]) -> FileFacts:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        write(partial)
        sync(partial)
        facts = facts_of_file(partial)
        partial.replace(file)
        sync(file.parent)
        return facts

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        files = {name: self.path / name for name in names}
        return {name: file.stat().st_size if file.is_file() else None for name, file in files.items()}

    def files(self, below: str = "") -> list[str]:
        found = (file for file in (self.path / below).rglob("*") if file.is_file())
        return sorted(file.relative_to(self.path).as_posix() for file in found)

    def folders(self, below: str) -> list[str]:
        folders = (folder for folder in (self.path / below).glob("*") if folder.is_dir())
        return sorted(folder.name for folder in folders if any(file.is_file() for file in folder.rglob("*")))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink()

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self.path / name)

    def make_durable(self, names: Iterable[str]) -> None:
        for name in names:
            sync(self.path / name)

    def digest(self, name: str) -> str:
        return file_digest(self.path / name)

    def local(
        self, name: str, digest: Callable[[], str], digest_of: Callable[[Path], str] = file_digest
    ) -> AbstractContextManager[Path]:
        return nullcontext(self.path / name)

    def keep(self, file: Path, holder: object) -> None:
        pass

    def arrays(self, name: str) -> Any:
        return self.path / name

    def clear_errors(self) -> AbstractContextManager[None]:
        return nullcontext()


def facts_of(content: bytes) -> FileFacts:
    """Size and digest of a file of this content."""
    return {"size_bytes": len(content), "digest": bytes_digest(content)}


def facts_of_file(file: Path) -> FileFacts:
    """Size and digest of a file of this machine."""
    return {"size_bytes": file.stat().st_size, "digest": file_digest(file)}


@contextmanager
def clear_storage_errors(folder: Folder) -> Iterator[None]:
    """Says what a failed write means for the index."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or isinstance(error, StorageError):
            raise
        raise StorageError(
            error.errno,
            f"{_UNWRITABLE[error.errno]}: {folder} could not be written to ({error}); finished blocks are kept: mend "
            "it, and run the same command to go on",
        ) from error
