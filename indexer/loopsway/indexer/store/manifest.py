"""What an index is, as JSON: the `Plan` of each part, fixed before its first block, and the `Manifest`, written last.

`manifest.json` is published by one atomic rename: an index has either all of a generation or nothing of it. A copy of
each generation's manifest stays in `manifests/`, so that earlier ones can be opened until they are pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..config import Approximation, Checkpoint, Loop, SketchConfig
from .files import file_digest
from .folders import FileFacts, Folder, IndexDamagedError
from .sealed import SealError, read_sealed, write_sealed

FORMAT_VERSION = 4
MANIFEST, HISTORY, PARTS, PLAN = "manifest.json", "manifests", "generations", "plan.json"


class IndexNotFoundError(FileNotFoundError):
    """There is no finished index at this path."""


class IndexExistsError(FileExistsError):
    """The path already holds an index, or a begun one, of something else."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a build fixes before its first block. Two builds with equal plans store the same bytes.

    Attributes:
        fingerprint: of the sketches; a query must have the same.
        parameters: names and shapes of what is attributed to.
        examples_digest: of all examples in order, their ids and what `collate` makes of each.
        task_code: digest of the files that define the task's class, for a build that goes on.
        checkpoint_digests: of the checkpoints' files, by checkpoint name, for those that name a file.
        block_rows: rows of a block, which owns whole chunks.
        shard_rows: rows of a FAISS index, whole blocks.
    """

    fingerprint: str
    task_spec: str | None
    task_arguments: Mapping[str, Any] = field(default_factory=dict)
    loop: Loop
    config: SketchConfig
    checkpoints: tuple[Checkpoint, ...]
    parameters: Mapping[str, tuple[int, ...]]
    num_examples: int
    num_steps: int
    examples_digest: str
    task_code: str
    checkpoint_digests: Mapping[str, str]
    batch_size: int
    block_rows: int
    shard_rows: int

    @property
    def width(self) -> int:
        assert self.config.width is not None
        return self.config.width

    @property
    def num_blocks(self) -> int:
        return -(-self.num_examples // self.block_rows)

    def blocks_of(self, rows: range) -> range:
        """Numbers of the blocks that hold these rows."""
        return range(rows.start // self.block_rows, -(-rows.stop // self.block_rows)) if rows else range(0)

    def rows_of(self, block: int) -> range:
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.num_examples))

    def shards(self) -> list[range]:
        """Rows of each FAISS index of a slot."""
        starts = range(0, self.num_examples, self.shard_rows)
        return [range(start, min(start + self.shard_rows, self.num_examples)) for start in starts]

    def to_dict(self) -> dict[str, Any]:
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data["loop"], data["config"] = self.loop.to_dict(), self.config.to_dict()
        data["checkpoints"] = [checkpoint.to_dict() for checkpoint in self.checkpoints]
        data["parameters"] = {name: list(shape) for name, shape in self.parameters.items()}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        made = dict(data)
        made["loop"], made["config"] = Loop.from_dict(data["loop"]), SketchConfig.from_dict(data["config"])
        made["checkpoints"] = tuple(map(Checkpoint.from_dict, data["checkpoints"]))
        made["parameters"] = {name: tuple(shape) for name, shape in data["parameters"].items()}
        return cls(**made)

    def differences(self, other: Plan, *, ignoring: Sequence[str] = ()) -> list[str]:
        """What the two plans say differently about the index's content, as text `name: mine -> other's`.

        How the task was named, where its checkpoints lie and how examples were batched are not content.
        """
        mine, theirs = self._content(), other._content()
        return [
            f"{name}: {mine[name]} -> {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name] and name not in ignoring
        ]

    def _content(self) -> dict[str, Any]:
        data = self.to_dict()
        for name in ("task_spec", "task_arguments", "batch_size", "block_rows", "shard_rows"):
            del data[name]
        data["checkpoints"] = [(each.name, each.learning_rate) for each in self.checkpoints]
        return data


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that were built together: one folder, which never changes once it is published.

    Attributes:
        folder: below the index's, such as `generations/000001`.
        plan: that it was built by.
        steps_without_gradient: steps whose sketches are zero because training cut them off from the loss.
        mean_losses: of all examples but the skipped ones, at each checkpoint.
        num_skipped: examples without a finite loss or gradient; their rows are zeros.
        sketching: how each parameter was sketched in the last batch, as `PlanEntry.to_dict` gives it.
        files: size in bytes and digest of each file written once the blocks were, by path within the index.
        approximation: of its FAISS indices. It is no part of the plan: blocks are the same whatever it is.
    """

    folder: str
    plan: Plan
    steps_without_gradient: tuple[int, ...]
    mean_losses: tuple[float, ...]
    num_skipped: int
    sketching: tuple[dict[str, Any], ...]
    files: Mapping[str, FileFacts]
    approximation: Approximation = field(default_factory=Approximation)

    @cached_property
    def own_files(self) -> dict[str, FileFacts]:
        """The files by their paths within the part."""
        return {name.removeprefix(f"{self.folder}/"): facts for name, facts in self.files.items()}

    def to_dict(self) -> dict[str, Any]:
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        return data | {"plan": self.plan.to_dict(), "approximation": self.approximation.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Part:
        made = {**data, "plan": Plan.from_dict(data["plan"])}
        made["approximation"] = Approximation.from_dict(data.get("approximation", {}))  # older parts say nothing
        for name in ("steps_without_gradient", "mean_losses", "sketching"):
            made[name] = tuple(data[name])
        return cls(**made)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One generation of an index: what its readers see, all of it or nothing.

    Attributes:
        generation: its number, from 1; every change that is published makes the next.
        created_at: when it was published, ISO 8601, UTC.
        parts: that hold its rows, in their order.
        deleted: path within the index of the table of deleted rows; None when none is.
        files: size and digest of that file.
    """

    generation: int
    created_at: str
    parts: tuple[Part, ...]
    deleted: str | None = None
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """Of the first part. All have its loop, config, parameters, checkpoints and number of steps."""
        return self.parts[0].plan

    @property
    def num_rows(self) -> int:
        """Deleted ones included."""
        return sum(part.plan.num_examples for part in self.parts)

    def part_rows(self) -> list[range]:
        """Rows of each part, numbered through."""
        ends = list(accumulate(part.plan.num_examples for part in self.parts))
        return [range(end - part.plan.num_examples, end) for part, end in zip(self.parts, ends, strict=True)]

    def blocks(self) -> list[range]:
        """Rows that lie together, block by block, numbered through."""
        return [
            range(own.start + rows.start, own.start + rows.stop)
            for part, own in zip(self.parts, self.part_rows(), strict=True)
            for rows in map(part.plan.rows_of, range(part.plan.num_blocks))
        ]

    @property
    def all_files(self) -> dict[str, FileFacts]:
        """Every file that this generation reads, but for blocks and their entries."""
        return {name: facts for each in (*self.parts, self) for name, facts in each.files.items()}

    def write(self, folder: Folder) -> None:
        """Publishes it: readers that open the index from now on see it."""
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data |= {"format_version": FORMAT_VERSION, "parts": [part.to_dict() for part in self.parts]}
        write_sealed(folder, history_file(self.generation), data)
        write_sealed(folder, MANIFEST, data)

    @classmethod
    def read(cls, folder: Folder, generation: int | None = None) -> Manifest:
        """The manifest of the index in this folder.

        Args:
            folder: of the index.
            generation: an earlier one that is still kept; None: the last.

        Raises:
            IndexNotFoundError: no index, an unfinished one, or no such generation.
            IndexDamagedError: it can't be read, or has another format version.
        """
        data = _read_manifest(folder, generation)
        _check_version(folder, data.pop("format_version", None))
        try:
            return cls(**{**data, "parts": tuple(map(Part.from_dict, data["parts"]))})
        except (KeyError, TypeError, ValueError) as error:
            raise IndexDamagedError(f"the manifest of index {folder} is damaged: {error}; rebuild the index") from error

    @staticmethod
    def kept(folder: Folder) -> list[int]:
        """Numbers of the generations that can be opened, from the earliest to the last; none before the first."""
        if not is_published(folder):
            return []
        last = Manifest.read(folder).generation  # what a publication that was cut wrote beside it is not kept
        return sorted({last, *(number for number in history_numbers(folder) if number < last)})


def is_published(folder: Folder) -> bool:
    """Whether it holds a finished index."""
    return folder.sizes([MANIFEST])[MANIFEST] is not None


def history_file(generation: int) -> str:
    """Where the manifest of a generation stays."""
    return f"{HISTORY}/{generation:06d}.json"


def history_numbers(folder: Folder) -> list[int]:
    """Of the generations whose manifests stayed, from the earliest to the last that was written, published or not."""
    return sorted(int(Path(file).stem) for file in folder.files(HISTORY) if file.endswith(".json"))


def checkpoint_digests(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """Digests of the checkpoints' files by checkpoint name; those that name no file have none."""
    files = {each.name: Path(each.path) for each in checkpoints if each.path is not None}
    return {name: file_digest(file) for name, file in files.items() if file.is_file()}


def _read_manifest(folder: Folder, generation: int | None) -> dict[str, Any]:
    try:
        return read_sealed(folder, MANIFEST if generation is None else history_file(generation))
    except FileNotFoundError:
        if generation is not None and is_published(folder):
            kept = ", ".join(map(str, Manifest.kept(folder)))
            raise IndexNotFoundError(f"index {folder} has no generation {generation}; it keeps {kept}") from None
        if folder.folders(PARTS):
            raise IndexNotFoundError(
                f"index {folder} is unfinished: run the same `loopsway build` again, it goes on where it was"
            ) from None
        raise IndexNotFoundError(
            f"there is no index at {folder}; make one with `loopsway build --out {folder}`"
        ) from None
    except SealError as error:
        if isinstance(error.data, dict) and "format_version" in error.data:
            _check_version(folder, error.data["format_version"])  # of a version without digests, perhaps
        raise IndexDamagedError(f"the manifest of index {folder} is damaged: {error}; rebuild the index") from error


def _check_version(folder: Folder, version: Any) -> None:
    if version != FORMAT_VERSION:
        raise IndexDamagedError(
            f"index {folder} has format version {version}, this Loopsway reads {FORMAT_VERSION}; rebuild the index, or "
            "open it with the Loopsway that wrote it"
        )
