"""Step-resolved data attribution: from a task's checkpoints and examples to an index that can be searched.

The data's way: Task -> capture (activations and output gradients, by step) -> sketch -> features [B, S, W] -> store
(Zarr blocks) -> search (FAISS) -> index. Nothing here knows gRPC.
"""

from .build import build_index
from .config import Checkpoint, Loop, SketchConfig
from .features import ExampleSketcher
from .index import Index, UnknownExampleError, open_index
from .manifest import IndexDamagedError, IndexExistsError, IndexNotFoundError
from .plan import PlanEntry
from .ranking import Example, Influencers, Ranked, Ranking
from .sketcher import StepSketcher
from .task import Task, TaskError, is_shipped, load_task

__all__ = [
    "Checkpoint",
    "Example",
    "ExampleSketcher",
    "Index",
    "IndexDamagedError",
    "IndexExistsError",
    "IndexNotFoundError",
    "Influencers",
    "Loop",
    "PlanEntry",
    "Ranked",
    "Ranking",
    "SketchConfig",
    "StepSketcher",
    "Task",
    "TaskError",
    "UnknownExampleError",
    "build_index",
    "is_shipped",
    "load_task",
    "open_index",
]
