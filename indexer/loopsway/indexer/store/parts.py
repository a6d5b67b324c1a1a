"""The folders of an index's parts, finished or begun."""

from __future__ import annotations

from .folders import Folder
from .manifest import PARTS, PLAN, Manifest


def part_names(folder: Folder) -> list[str]:
    """Of all parts, finished or not, such as `generations/000001`, in the order of their numbers."""
    return [f"{PARTS}/{number}" for number in folder.folders(PARTS) if number.isdigit()]


def new_part_name(folder: Folder) -> str:
    """Of a part that is not there yet."""
    last = max((int(name.rpartition("/")[2]) for name in part_names(folder)), default=0)
    return f"{PARTS}/{last + 1:06d}"


def kept_parts(folder: Folder, generations: list[int] | None = None) -> set[str]:
    """Names of the parts that these generations read; None: all that can be opened."""
    kept: set[str] = set()
    for generation in Manifest.kept(folder) if generations is None else generations:
        manifest = Manifest.read(folder, generation)
        kept |= {part.folder for part in manifest.parts}
        if manifest.deleted is not None:
            kept.add(manifest.deleted.rpartition("/")[0])
    return kept


def unfinished_part(folder: Folder) -> str | None:
    """The name of a part that was begun and is in no generation."""
    kept = kept_parts(folder)
    begun = [name for name in part_names(folder) if name not in kept]
    with_plan = folder.sizes(f"{name}/{PLAN}" for name in begun)
    return next((name for name in reversed(begun) if with_plan[f"{name}/{PLAN}"] is not None), None)


def remove_partial_files(folder: Folder) -> None:
    """What a writer that was killed left half-written; an object store has none."""
    if folder.is_local:
        folder.remove(name for name in folder.files() if name.endswith(".partial"))
