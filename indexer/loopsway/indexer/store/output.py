"""Tables, and folders that a job fills for other tools: one is gone on with when it holds the same job's beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet

from ..progress import BuildProgress
from ..stopping import stop_on_signals
from .folders import FileFacts, Folder, clear_storage_errors

_Part = TypeVar("_Part", bound=Sized)


def begin_output(folder: Folder, name: str, description: bytes) -> None:
    """Writes what the job is to the file of this name.

    Raises:
        FileExistsError: the folder holds something else.
    """
    files = folder.files()
    begun = folder.read(name) if name in files else None
    if begun is None and files:
        raise FileExistsError(f"{folder} holds something else, {files[0]} for one; name an empty folder")
    if begun is not None and begun != description:
        raise FileExistsError(f"{folder} holds the output of another job ({name} says of what); name an empty folder")
    folder.write(name, description)


def write_table(folder: Folder, name: str, table: pa.Table) -> FileFacts:
    """Writes a table as Parquet; gives the file's size and digest."""
    return folder.write_file(name, lambda file: pyarrow.parquet.write_table(table, file))


def fill(
    folder: Folder, parts: Mapping[str, _Part], write: Callable[[str, _Part], None], *, doing: str, progress: bool
) -> None:
    """Writes the files that are not there yet, one after another.

    Args:
        folder: that `begin_output` began.
        parts: what belongs into each file, by its name; the length is what progress is measured by.
        write: makes a file, whole, given its name and its part.
        doing: what the job does, for people.
        progress: whether to draw progress on the terminal.

    Raises:
        StoppedError: a signal asked it to stop.
        StorageError: the folder can't be written to.
    """
    sizes = folder.sizes(parts)
    missing = {name: part for name, part in parts.items() if sizes[name] is None}
    total = sum(map(len, parts.values()))
    with (
        clear_storage_errors(folder),
        BuildProgress(shown=progress) as bars,
        stop_on_signals(bars.announce_stop) as stop,
    ):
        bars.begin(doing, total, done=total - sum(map(len, missing.values())))
        for name, part in missing.items():
            write(name, part)
            bars.advance(len(part))
            stop.raise_if_asked(f"stopped as asked: {folder} is not whole; run the same command to go on")
