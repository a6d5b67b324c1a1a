"""Reads everything that an index consists of and names what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..progress import BuildProgress
from ..store.addresses import open_folder
from ..store.entries import entry_file
from ..store.folders import Folder, IndexDamagedError
from ..store.generation import Generation
from ..store.manifest import MANIFEST, PLAN, Manifest, history_file
from ..store.sealed import SealError, read_sealed


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A piece of an index that is not what was written.

    Attributes:
        file: the piece, by its path or URL.
        problem: what is wrong with it.
    """

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def verify_index(path: str | Path, *, progress: bool = True) -> list[Damage]:
    """Every damaged piece of a published index; none if it is sound.

    Reads all of it, and compares every file and every block's part of every array with the digest that the build kept.

    Args:
        path: the index's folder, or its URL.
        progress: whether to draw progress on the terminal.

    Raises:
        IndexNotFoundError: there is no index, or it is unfinished.
    """
    folder = open_folder(path)
    try:
        manifest = Manifest.read(folder)
    except IndexDamagedError as error:
        return [Damage(file=folder.at(MANIFEST), problem=str(error))]
    stored = [Generation(folder / part.folder, part.plan) for part in manifest.parts]
    with BuildProgress(shown=progress) as bars:
        found = {damage.file: damage for damage in _damaged_files(folder, manifest)}
        bars.begin("reading blocks", sum(part.plan.num_blocks for part in manifest.parts))
        for generation in stored:
            for block in range(generation.plan.num_blocks):
                for damage in _damages_of(generation, block):
                    found.setdefault(damage.file, damage)
                bars.advance()
    return list(found.values())


def _damaged_files(folder: Folder, manifest: Manifest) -> Iterator[Damage]:
    files = manifest.all_files
    sizes = folder.sizes(files)
    for name, facts in files.items():
        if sizes[name] is None:
            yield Damage(file=folder.at(name), problem="is missing")
        elif sizes[name] != facts["size_bytes"]:
            yield Damage(file=folder.at(name), problem=f"has {sizes[name]:,} bytes, not {facts['size_bytes']:,}")
        elif folder.digest(name) != facts["digest"]:
            yield Damage(file=folder.at(name), problem="does not match its digest")
    sealed = [f"{part.folder}/{PLAN}" for part in manifest.parts]
    sealed += map(history_file, {*Manifest.kept(folder), manifest.generation})
    for name in sealed:
        try:
            read_sealed(folder, name)
        except FileNotFoundError:
            yield Damage(file=folder.at(name), problem="is missing")
        except SealError as error:
            yield Damage(file=folder.at(name), problem=str(error))


def _damages_of(generation: Generation, block: int) -> list[Damage]:
    at = generation.folder.at
    try:
        return [Damage(file=at(file), problem=problem) for file, problem in generation.damages(block)]
    except IndexDamagedError as error:
        return [Damage(file=at(entry_file(block)), problem=str(error))]
