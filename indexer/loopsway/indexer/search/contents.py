"""What a published index holds: what it is, its examples, its rows and their sketches.

N examples, S steps, W width, n chosen rows, K checkpoints.

This file asks nothing of the codes but what they say of chosen rows; index.py searches them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from ..config import Approximation, Checkpoint, Loop, SketchConfig
from ..sketches.rotation import rotate_back
from ..store.addresses import open_folder
from ..store.files import file_digest
from ..store.folders import IndexDamagedError, LocalFolder
from ..store.generation import ROW_AXES, Generation
from ..store.manifest import Manifest, checkpoint_digests
from .device_scan import DeviceScan
from .ranking import Example
from .reading import CodeReader

EXAMPLES, SKIPPED, RECALL = "examples.parquet", "skipped.parquet", "recall.json"


class UnknownExampleError(LookupError):
    """No example of this id is in the index."""


class IndexContents:
    """A generation of an index, opened for reading. Thread-safe.

    Args:
        path: its folder, or its URL.
        generation: which; None: the last.
        scan: reads the codes in exact searches; None: the processor does.
        rows: those of which this process reads the codes; None: all.
        name: what it is called; None: as its folder, without ".index".

    Attributes:
        folder: where it lies.
        name: what it is called.
        manifest: what it is.
        codes: reads them in this process.
    """

    def __init__(
        self,
        path: str | Path,
        generation: int | None,
        scan: DeviceScan | None = None,
        rows: range | None = None,
        name: str | None = None,
    ) -> None:
        self.folder = open_folder(path)
        self.name = name or self.folder.address.rpartition("/")[2].removesuffix(".index")
        self.manifest = Manifest.read(self.folder, generation)
        self._check_files()
        self._stored = [Generation(self.folder / part.folder, part.plan) for part in self.manifest.parts]
        self._is_deleted = self._read_deleted()
        self.codes = CodeReader(self.manifest, self._stored, self._is_deleted, scan, rows)

    @property
    def path(self) -> Path | str:
        """Its folder, or its URL."""
        return self.folder.path if isinstance(self.folder, LocalFolder) else self.folder.address

    @property
    def num_rows(self) -> int:
        """Deleted ones included."""
        return self.manifest.num_rows

    @property
    def num_examples(self) -> int:
        return self.num_rows - int(self._is_deleted.sum())

    @property
    def num_skipped(self) -> int:
        """How many of them had no finite loss or gradient and are in no answer."""
        return sum(not self._is_deleted[row] for row in self._skipped_rows)

    @property
    def num_steps(self) -> int:
        return self.manifest.plan.num_steps

    @property
    def width(self) -> int:
        return self.manifest.plan.width

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def fingerprint(self) -> str:
        return self.manifest.plan.fingerprint

    @property
    def config(self) -> SketchConfig:
        return self.manifest.plan.config

    @property
    def loop(self) -> Loop:
        return self.manifest.plan.loop

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return self.manifest.plan.checkpoints

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is attributed to."""
        return dict(self.manifest.plan.parameters)

    @property
    def task_spec(self) -> str | None:
        return self.manifest.plan.task_spec

    @property
    def task_arguments(self) -> dict[str, Any]:
        return dict(self.manifest.plan.task_arguments)

    @property
    def generation(self) -> int:
        return self.manifest.generation

    @property
    def created_at(self) -> str:
        return self.manifest.created_at

    @property
    def steps_without_gradient(self) -> tuple[int, ...]:
        return tuple(sorted(set.intersection(*(set(part.steps_without_gradient) for part in self.manifest.parts))))

    @property
    def plan(self) -> list[dict[str, Any]]:
        """How each parameter was sketched in the last part, and what it cost: the fields of `PlanEntry`."""
        return [dict(entry) for entry in self.manifest.parts[-1].sketching]

    @property
    def slots(self) -> list[str]:
        """What the rows of a sketch stand for: the steps from "0" on; with Loop(outside=True) "before" and "after"."""
        if not self.loop.outside:
            return [str(step) for step in range(self.num_steps)]
        return [*(str(step) for step in range(self.num_steps - 2)), "before", "after"]

    @property
    def size_bytes(self) -> int:
        """On disk, all files of this generation's parts."""
        return sum(stored.size_bytes() for stored in self._stored)

    @property
    def recall(self) -> dict[str, Any]:
        """What the build measured of its FAISS indices against a scan of every code, of the worst part."""
        return min(self._recalls, key=lambda each: min(each["by_slot"].values()))

    @cached_property
    def _recalls(self) -> list[dict[str, Any]]:
        """Of each part."""
        return [json.loads(stored.folder.read(RECALL)) for stored in self._stored]

    @property
    def approximation(self) -> Approximation:
        """Of the FAISS indices: that of the first part, which later ones keep."""
        return self.manifest.parts[0].approximation

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Ids of the skipped examples, and what is not finite of each."""
        return {
            self._ids[row].as_py(): reason for row, reason in self._skipped_rows.items() if not self._is_deleted[row]
        }

    @cached_property
    def _skipped_rows(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for part, start in zip(self.manifest.parts, self._starts, strict=True):
            table = self._table(f"{part.folder}/{SKIPPED}")
            rows = (start + row for row in table["row"].to_pylist())
            found |= dict(zip(rows, table["reason"].to_pylist(), strict=True))
        return found

    @property
    def _starts(self) -> list[int]:
        """The first row of each part."""
        return [rows.start for rows in self.manifest.part_rows()]

    def _read_deleted(self) -> np.ndarray:
        is_deleted = np.zeros(self.num_rows, bool)
        if self.manifest.deleted is not None:
            is_deleted[self._table(self.manifest.deleted, ["row"])["row"].to_numpy()] = True
        return is_deleted

    def stored_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the arrays of the store hold of these rows, by name; rows are the last dimension but that of codes."""
        places = np.searchsorted(self._starts, rows, side="right") - 1
        read = [stored.rows(rows[places == part] - self._starts[part]) for part, stored in enumerate(self._stored)]
        order = np.argsort(np.argsort(places, kind="stable"), kind="stable")
        return {
            name: np.concatenate([part[name] for part in read], axis=axis).take(order, axis=axis)
            for name, axis in ROW_AXES.items()
        }

    def sketches(self, rows: np.ndarray) -> np.ndarray:
        """Sketches as their codes have them, float32 [n, S + 1, W]: of each step, then of the total.

        Their inner products with a query's sketch are the influences that searches give.
        """
        slots = [*range(self.num_steps), None]
        decoded = np.stack([self.codes.decoded(slot, rows) for slot in slots], axis=1)
        return rotate_back(torch.from_numpy(decoded), self.config.seed, self.config.rotations).numpy()

    def live_rows(self) -> np.ndarray:
        """Rows that are not deleted, int64, ascending."""
        return np.flatnonzero(~self._is_deleted)

    def sketched_rows(self) -> np.ndarray:
        """Rows that are neither deleted nor skipped, int64, ascending."""
        return np.setdiff1d(self.live_rows(), list(self._skipped_rows))

    def changed_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
        """Names of those whose files are not the ones that the index was built from."""
        built, now = self.manifest.plan.checkpoint_digests, checkpoint_digests(checkpoints)
        return tuple(name for name, digest in now.items() if built.get(name, digest) != digest)

    def mean_losses(self) -> np.ndarray:
        """The mean loss of all rows, deleted ones included, at each checkpoint, [K]."""
        counts = [part.plan.num_examples - part.num_skipped for part in self.manifest.parts]
        return np.average([part.mean_losses for part in self.manifest.parts], axis=0, weights=counts)

    def blocks(self) -> list[range]:
        """Rows that lie together, block by block: all of them, deleted ones included."""
        return self.manifest.blocks()

    def step_norms(self) -> np.ndarray:
        """Norms of all sketches, float32 [S, N]."""
        return np.stack([self.codes.norms(step) for step in range(self.num_steps)])

    def total_norms(self) -> np.ndarray:
        """Norms of the sketches summed over steps, float32 [N]."""
        return self.codes.norms(None)

    def example(self, row: int) -> Example:
        """The example in this row."""
        return self.examples_in([row])[0]

    def examples_in(self, rows: Sequence[int] | np.ndarray) -> list[Example]:
        """The examples in these rows; a tenth of the time of one after another."""
        columns = self.columns_in(rows)
        return [
            Example(id=each, description=description, metadata=metadata)
            for each, description, metadata in zip(
                columns["id"], columns["description"], columns["metadata"], strict=True
            )
        ]

    def columns_in(self, rows: Sequence[int] | np.ndarray) -> dict[str, list[Any]]:
        """Columns "id", "description" and "metadata" ({} where the task has none) of the examples in these rows."""
        return {"metadata": [{}] * len(rows)} | self.examples.take(np.asarray(rows, np.int64)).to_pydict()

    def ids_in(self, rows: np.ndarray) -> list[str]:
        """Ids of the examples in these rows."""
        return self._ids.take(rows).to_pylist()

    def row_of(self, example_id: str) -> int:
        """The row of an example.

        Raises:
            UnknownExampleError: the id is not in the index.
        """
        row = self._rows_by_id.get(example_id)
        if row is not None and self._is_deleted[row]:
            raise UnknownExampleError(f"example {example_id!r} was deleted from index {self.name}")
        if row is None:
            raise UnknownExampleError(
                f"example {example_id!r} is not among the {self.num_examples} of index {self.name}; its ids look like "
                f"{self.examples['id'][0].as_py()!r}"
            )
        if self.num_skipped and example_id in self.skipped:
            raise UnknownExampleError(
                f"example {example_id!r} was skipped when index {self.name} was built: its {self.skipped[example_id]}"
            )
        return row

    def _check_files(self) -> None:
        files = self.manifest.all_files
        for name, size in self.folder.sizes(files).items():
            if size != files[name]["size_bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, not {files[name]['size_bytes']}"
                raise IndexDamagedError(f"index {self.folder} is damaged: {self.folder.at(name)} {state}; rebuild it")

    @cached_property
    def examples(self) -> Any:
        """Ids, descriptions and metadata of all rows, a pyarrow table."""
        names = [f"{part.folder}/{EXAMPLES}" for part in self.manifest.parts]
        return pa.concat_tables(map(self._table, names)).combine_chunks()

    def _table(self, name: str, columns: list[str] | None = None) -> Any:
        digest = self.manifest.all_files[name]["digest"]
        with self.folder.local(name, lambda: digest) as file:
            if file_digest(file) != digest:  # Parquet itself does not see every changed byte
                raise IndexDamagedError(
                    f"{self.folder.at(name)} is damaged: it does not match its digest; `loopsway verify` names more"
                )
            return pyarrow.parquet.read_table(file, columns=columns)

    @property
    def _ids(self) -> Any:
        return self.examples["id"]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        """Of deleted rows too, unless a later one has the same id."""
        return {example_id: row for row, example_id in enumerate(self._ids.to_pylist())}
