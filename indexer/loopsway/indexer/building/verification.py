"""Reads everything that an index consists of, or what a generation adds to it, and names what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..progress import BuildProgress
from ..store.addresses import open_folder
from ..store.entries import entry_file
from ..store.folders import FileFacts, Folder, IndexDamagedError
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
        damaged = (*_damaged_files(folder, manifest.all_files), *_damaged_seals(folder, manifest))
        found = {damage.file: damage for damage in damaged}
        bars.begin("reading blocks", sum(part.plan.num_blocks for part in manifest.parts))
        for generation in stored:
            for block in range(generation.plan.num_blocks):
                for damage in _damages_of(generation, block):
                    found.setdefault(damage.file, damage)
                bars.advance()
    return list(found.values())


def check_added(folder: Folder, manifest: Manifest, before: Manifest, go_on: Callable[[], object]) -> None:
    """Compares with its digests what a generation has and another one has not: files, and the blocks of parts.

    Reads that much, on one thread; of an object store nothing, from which whatever is fetched is compared at once.

    Args:
        folder: of the index.
        manifest: of the generation.
        before: of the other one.
        go_on: is called before each block; what it raises ends this.

    Raises:
        IndexDamagedError: names the first piece that is not what was written.
    """
    if not folder.is_local:
        return
    for damage in _damages_added(folder, manifest, before, go_on):
        raise IndexDamagedError(f"index {folder} is damaged: {damage}; `loopsway verify` names all; rebuild it")


def _damages_added(
    folder: Folder, manifest: Manifest, before: Manifest, go_on: Callable[[], object]
) -> Iterator[Damage]:
    known = before.all_files
    yield from _damaged_files(
        folder, {name: facts for name, facts in manifest.all_files.items() if known.get(name) != facts}
    )
    for part in manifest.parts:
        if part not in before.parts:
            stored = Generation(folder / part.folder, part.plan)
            for block in range(part.plan.num_blocks):
                go_on()
                yield from _damages_of(stored, block)


def _damaged_files(folder: Folder, files: Mapping[str, FileFacts]) -> Iterator[Damage]:
    sizes = folder.sizes(files)
    for name, facts in files.items():
        if sizes[name] is None:
            yield Damage(file=folder.at(name), problem="is missing")
        elif sizes[name] != facts["size_bytes"]:
            yield Damage(file=folder.at(name), problem=f"has {sizes[name]:,} bytes, not {facts['size_bytes']:,}")
        elif folder.digest(name) != facts["digest"]:
            yield Damage(file=folder.at(name), problem="does not match its digest")


def _damaged_seals(folder: Folder, manifest: Manifest) -> Iterator[Damage]:
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
