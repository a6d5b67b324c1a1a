"""Step-resolved data attribution: from a task's checkpoints and examples to an index that can be searched.

The data's way: Task -> capture (activations and output gradients, by step) -> sketch -> features [B, S, W] -> store
(Zarr blocks) -> search (a scan, FAISS) -> index. Nothing here knows gRPC.
"""

from .blocks import NonFiniteExampleError
from .build import add_examples, build_index
from .config import Checkpoint, Loop, SketchConfig
from .editing import compact_index, delete_examples, prune_index
from .export import export_index
from .features import ExampleSketcher
from .filters import FilterError
from .folders import IndexDamagedError, StorageError
from .index import Index, UnknownExampleError, open_index
from .lock import IndexLockedError
from .manifest import IndexExistsError, IndexNotFoundError
from .plan import PlanEntry
from .ranking import Example, Influencers, Ranked, Ranking
from .sketcher import StepSketcher
from .stopping import StoppedError
from .task import Task, TaskError, is_shipped, load_task
from .verification import Damage, verify_index

__all__ = [
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
