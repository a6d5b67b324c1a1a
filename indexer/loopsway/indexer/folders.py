"""The folders of an index's parts, and what a failed write to them means."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .manifest import PARTS, PLAN, Manifest

_UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


class StorageError(OSError):
    """The index's folder can't be written to."""


def part_folders(path: Path) -> list[Path]:
    """All of them, finished or not, in the order of their numbers."""
    return sorted(folder for folder in (path / PARTS).glob("*") if folder.name.isdigit())


def new_part_folder(path: Path) -> Path:
    """A folder that was never used."""
    last = max((int(folder.name) for folder in part_folders(path)), default=0)
    return path / PARTS / f"{last + 1:06d}"


def kept_folders(path: Path, generations: list[int] | None = None) -> set[Path]:
    """Folders that these generations read; None: all that can be opened."""
    kept: set[Path] = set()
    for generation in Manifest.kept(path) if generations is None else generations:
        manifest = Manifest.read(path, generation)
        kept |= {path / part.folder for part in manifest.parts}
        if manifest.deleted is not None:
            kept.add((path / manifest.deleted).parent)
    return kept


def unfinished_part(path: Path) -> Path | None:
    """The folder of a part that was begun and is in no generation."""
    kept = kept_folders(path)
    begun = [folder for folder in part_folders(path) if folder not in kept and (folder / PLAN).exists()]
    return begun[-1] if begun else None


def remove_partial_files(path: Path) -> None:
    """What a writer that was killed left half-written."""
    for partial in path.rglob("*.partial"):
        partial.unlink()


@contextmanager
def clear_storage_errors(path: Path) -> Iterator[None]:
    """Says what a failed write means for the index."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or isinstance(error, StorageError):
            raise
        raise StorageError(
            error.errno,
            f"{_UNWRITABLE[error.errno]}: {path} could not be written to ({error}); finished blocks are kept: mend it, "
            "and run the same command to go on",
        ) from error
