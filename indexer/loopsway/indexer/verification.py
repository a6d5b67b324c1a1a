"""Reads everything that an index consists of and names what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import SealError, file_digest, read_sealed
from .manifest import HISTORY, MANIFEST, PLAN, IndexDamagedError, Manifest
from .progress import BuildProgress
from .store import Generation


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A piece of an index that is not what was written.

    Attributes:
        file: the piece.
        problem: what is wrong with it.
    """

    file: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def verify_index(path: str | Path, *, progress: bool = True) -> list[Damage]:
    """Every damaged piece of a published index; none if it is sound.

    Reads all of it, and compares every file and every block's part of every array with the digest that the build kept.

    Args:
        path: the index's folder.
        progress: whether to draw progress on the terminal.

    Raises:
        IndexNotFoundError: there is no index, or it is unfinished.
    """
    path = Path(path)
    try:
        manifest = Manifest.read(path)
    except IndexDamagedError as error:
        return [Damage(file=path / MANIFEST, problem=str(error))]
    stored = [Generation(path / part.folder, part.plan) for part in manifest.parts]
    with BuildProgress(shown=progress) as bars:
        found = {damage.file: damage for damage in _damaged_files(path, manifest)}
        bars.begin("reading blocks", sum(part.plan.num_blocks for part in manifest.parts))
        for generation in stored:
            for block in range(generation.plan.num_blocks):
                for damage in _damages_of(generation, block):
                    found.setdefault(damage.file, damage)
                bars.advance()
    return list(found.values())


def _damaged_files(path: Path, manifest: Manifest) -> Iterator[Damage]:
    for name, facts in manifest.all_files.items():
        file = path / name
        if not file.is_file():
            yield Damage(file=file, problem="is missing")
        elif file.stat().st_size != facts["size_bytes"]:
            yield Damage(file=file, problem=f"has {file.stat().st_size:,} bytes, not {facts['size_bytes']:,}")
        elif file_digest(file) != facts["digest"]:
            yield Damage(file=file, problem="does not match its digest")
    sealed = [path / part.folder / PLAN for part in manifest.parts]
    sealed += [path / HISTORY / f"{generation:06d}.json" for generation in {*Manifest.kept(path), manifest.generation}]
    for file in sealed:
        try:
            read_sealed(file)
        except FileNotFoundError:
            yield Damage(file=file, problem="is missing")
        except SealError as error:
            yield Damage(file=file, problem=str(error))


def _damages_of(generation: Generation, block: int) -> list[Damage]:
    try:
        return [Damage(file=file, problem=problem) for file, problem in generation.damages(block)]
    except IndexDamagedError as error:
        return [Damage(file=generation.entry_file(block), problem=str(error))]
