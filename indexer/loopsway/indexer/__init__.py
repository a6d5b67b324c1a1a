"""Step-resolved data attribution: from a task's checkpoints and examples to an index that can be searched.

The data's way: Task -> capture (activations and output gradients, by step) -> sketch -> features [B, S, W] -> store
(Zarr blocks) -> search (a scan, FAISS) -> index. Nothing here knows gRPC.
"""

from .building.blocks import NonFiniteExampleError
from .building.build import add_examples, build_index
from .building.editing import compact_index, delete_examples, prune_index
from .building.export import export_index
from .building.recall import RecallError
from .building.verification import Damage, verify_index
from .config import Approximation, Checkpoint, Loop, SketchConfig
from .search.filters import FilterError
from .search.index import Index, UnknownExampleError, open_index
from .search.ranking import Example, Influencers, Ranked, Ranking
from .sketches.features import ExampleSketcher
from .sketches.plan import PlanEntry
from .sketches.sketcher import StepSketcher
from .stopping import StoppedError
from .store.folders import IndexDamagedError, StorageError
from .store.lock import IndexLockedError
from .store.manifest import IndexExistsError, IndexNotFoundError
from .task import Task, TaskError, is_shipped, load_task

__all__ = [
    "Approximation",
    "Checkpoint",
    "Damage",
    "Example",
    "ExampleSketcher",
    "FilterError",
    "Index",
    "IndexDamagedError",
    "IndexExistsError",
    "IndexLockedError",
    "IndexNotFoundError",
    "Influencers",
    "Loop",
    "NonFiniteExampleError",
    "PlanEntry",
    "Ranked",
    "Ranking",
    "RecallError",
    "SketchConfig",
    "StepSketcher",
    "StoppedError",
    "StorageError",
    "Task",
    "TaskError",
    "UnknownExampleError",
    "add_examples",
    "build_index",
    "compact_index",
    "delete_examples",
    "export_index",
    "is_shipped",
    "load_task",
    "open_index",
    "prune_index",
    "verify_index",
]
