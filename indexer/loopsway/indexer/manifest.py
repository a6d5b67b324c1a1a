"""What an index is, as JSON: its `Plan`, fixed before the first block, and its `Manifest`, written last.

`manifest.json` is published by one atomic rename: an index has either all of a generation or nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import Checkpoint, Loop, SketchConfig
from .files import SealError, file_digest, read_sealed, write_sealed

FORMAT_VERSION = 3
MANIFEST, PLAN = "manifest.json", "plan.json"


class IndexNotFoundError(FileNotFoundError):
    """There is no finished index at this path."""


class IndexDamagedError(ValueError):
    """A part of the index is missing, unreadable or not what its manifest says."""


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

    @property
    def width(self) -> int:
        assert self.config.width is not None
        return self.config.width

    @property
    def num_blocks(self) -> int:
        return -(-self.num_examples // self.block_rows)

    def rows_of(self, block: int) -> range:
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.num_examples))

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

    def differences(self, other: Plan, *, with_code: bool) -> list[str]:
        """What the two plans say differently about the index's content, as text `name: mine -> other's`.

        How the task was named, where its checkpoints lie and how examples were batched are not content. The task's
        code is, while blocks of one index are still being made.
        """
        mine, theirs = self._content(with_code), other._content(with_code)
        return [f"{name}: {mine[name]} -> {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def _content(self, with_code: bool) -> dict[str, Any]:
        data = self.to_dict()
        for name in ("task_spec", "task_arguments", "batch_size", "block_rows", *(() if with_code else ("task_code",))):
            del data[name]
        data["checkpoints"] = [(each.name, each.learning_rate) for each in self.checkpoints]
        return data


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A published index.

    Attributes:
        generation: number of the folder that holds it, from 1.
        created_at: when it was published, ISO 8601, UTC.
        steps_without_gradient: steps whose sketches are zero because training cut them off from the loss.
        mean_losses: of all examples but the skipped ones, at each checkpoint.
        num_skipped: examples without a finite loss or gradient; their rows are zeros.
        sketching: how each parameter was sketched in the last batch, as `PlanEntry.to_dict` gives it.
        files: size in bytes and digest of each file written once the blocks were, by path within the generation.
    """

    plan: Plan
    generation: int
    created_at: str
    steps_without_gradient: tuple[int, ...]
    mean_losses: tuple[float, ...]
    num_skipped: int
    sketching: tuple[dict[str, Any], ...]
    files: Mapping[str, Mapping[str, Any]]

    def write(self, path: Path) -> None:
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        write_sealed(path / MANIFEST, {"format_version": FORMAT_VERSION, **data, "plan": self.plan.to_dict()})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of the index in this folder.

        Raises:
            IndexNotFoundError: no index, or an unfinished one.
            IndexDamagedError: it can't be read, or has another format version.
        """
        data = _read_manifest(path)
        _check_version(path, data.pop("format_version", None))
        try:
            data["plan"] = Plan.from_dict(data["plan"])
            for name in ("steps_without_gradient", "mean_losses", "sketching"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise IndexDamagedError(f"the manifest of index {path} is damaged: {error}; rebuild the index") from error


def checkpoint_digests(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """Digests of the checkpoints' files by checkpoint name; those that name no file have none."""
    files = {each.name: Path(each.path) for each in checkpoints if each.path is not None}
    return {name: file_digest(file) for name, file in files.items() if file.is_file()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path / MANIFEST)
    except FileNotFoundError:
        if (path / "generations").is_dir():
            raise IndexNotFoundError(
                f"index {path} is unfinished: run the same `loopsway build` again, it goes on where it was"
            ) from None
        raise IndexNotFoundError(f"there is no index at {path}; make one with `loopsway build --out {path}`") from None
    except SealError as error:
        if isinstance(error.data, dict) and "format_version" in error.data:
            _check_version(path, error.data["format_version"])  # of a version without digests, perhaps
        raise IndexDamagedError(f"the manifest of index {path} is damaged: {error}; rebuild the index") from error


def _check_version(path: Path, version: Any) -> None:
    if version != FORMAT_VERSION:
        raise IndexDamagedError(
            f"index {path} has format version {version}, this Loopsway reads {FORMAT_VERSION}; rebuild the index, or "
            "open it with the Loopsway that wrote it"
        )
