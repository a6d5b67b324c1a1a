"""Step-resolved data attribution: from a task's checkpoints and examples to an index that can be searched.

The data's way: Task -> capture (activations and output gradients, by step) -> sketch -> features [B, S, W] -> store
(Zarr blocks) -> search (a scan, FAISS) -> index -> curation. Nothing here knows gRPC.
"""

from .building.blocks import NonFiniteExampleError
from .building.build import add_examples, build_index
from .building.editing import compact_index, delete_examples, prune_index
from .building.export import export_index
from .building.recall import RecallError
from .building.verification import Damage, verify_index
from .config import Approximation, Checkpoint, Loop, SketchConfig
from .curation.duplicates import find_duplicates
from .curation.energy import Estimate, StepEnergies, step_energies
from .curation.neighbors import Neighbors, find_neighbors
from .curation.query_set import ExampleQueries, QuerySet, SketchedQueries
from .curation.scoring import score_examples
from .curation.self_influence import score_self_influence, self_influences
from .search.contents import UnknownExampleError
from .search.filters import FilterError
from .search.index import Index, open_index
from .search.model import LoadError, allowed_task, load_sketcher
from .search.ranking import Example, Influencers, Ranked, Ranking, Scores
from .sketches.features import ExampleSketcher
from .sketches.gradient_sketcher import GradientError, GradientSketch, GradientSketcher
from .sketches.plan import PlanEntry
from .sketches.query_gradients import query_gradients
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
    "Estimate",
    "Example",
    "ExampleQueries",
    "ExampleSketcher",
    "FilterError",
    "GradientError",
    "GradientSketch",
    "GradientSketcher",
    "Index",
    "IndexDamagedError",
    "IndexExistsError",
    "IndexLockedError",
    "IndexNotFoundError",
    "Influencers",
    "LoadError",
    "Loop",
    "Neighbors",
    "NonFiniteExampleError",
    "PlanEntry",
    "QuerySet",
    "Ranked",
    "Ranking",
    "RecallError",
    "Scores",
    "SketchConfig",
    "SketchedQueries",
    "StepEnergies",
    "StepSketcher",
    "StoppedError",
    "StorageError",
    "Task",
    "TaskError",
    "UnknownExampleError",
    "add_examples",
    "allowed_task",
    "build_index",
    "compact_index",
    "delete_examples",
    "export_index",
    "find_duplicates",
    "find_neighbors",
    "is_shipped",
    "load_sketcher",
    "load_task",
    "open_index",
    "prune_index",
    "query_gradients",
    "score_examples",
    "score_self_influence",
    "self_influences",
    "step_energies",
    "verify_index",
]
