"""What each method says of a finished training: influences on the queries, and of examples on themselves.

N training examples, Q queries, S steps, P parameters of the body.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from loopsway.indexer import ExampleSketcher, Index, SketchConfig, build_index, open_index, self_influences
from loopsway.indexer.config import Resolve

from .peer import Bergson
from .predictions import ADAM, COSINE, EXACT, LOSS, RANDOM, SAME_STEPS, TRACIN, WHOLE, Predictions, step_name
from .training import TrainedTask

FILE = "predictions.npz"
WITHOUT_REFERENCE = (
    "step-decomposed-influence is not installed, so it is left out: pip install step-decomposed-influence"
)


def predict(
    task: TrainedTask, queries: Sequence[Any], folder: Path, seed: int, bergson: Bergson | None = None
) -> Predictions:
    """What all methods say.

    Args:
        task: the training.
        queries: of the subject.
        folder: takes the indices and what was found, which is used again.
        seed: of what the baseline draws.
        bergson: None leaves it out.
    """
    found = Predictions.read(folder / FILE) if (folder / FILE).exists() else _predict(task, queries, folder, seed)
    if bergson is not None:
        found.update(bergson.predict(task, queries, folder, seed))
    return found


def _predict(task: TrainedTask, queries: Sequence[Any], folder: Path, seed: int) -> Predictions:
    found = Predictions()
    index = _add_index(found, TRACIN, task, queries, folder / "body.index", SketchConfig())
    _add_index(found, WHOLE, task.whole_model(), queries, folder / "whole.index", SketchConfig())
    _add_index(found, ADAM, task, queries, folder / "adam.index", SketchConfig(optimizer_aware=True))
    norms = np.sqrt(found.self_influences[TRACIN])
    found.influences[COSINE] = found.influences[TRACIN] / np.maximum(norms, 1e-30)
    _add_steps(found, index, task, queries)
    if importlib.util.find_spec("sdi"):
        found.influences[EXACT], found.self_influences[EXACT] = _reference(task, queries)
    losses = _losses(task)
    found.influences[LOSS] = np.broadcast_to(losses, found.influences[TRACIN].shape)
    found.self_influences[LOSS] = losses
    draw = np.random.default_rng(seed)
    found.influences[RANDOM] = draw.standard_normal(found.influences[TRACIN].shape)
    found.self_influences[RANDOM] = draw.standard_normal(len(losses))
    found.write(folder / FILE)
    return found


def _add_index(
    found: Predictions, name: str, task: TrainedTask, queries: Sequence[Any], path: Path, config: SketchConfig
) -> Index:
    build = not (path / "manifest.json").exists()
    index = build_index(task, path, config, progress=False) if build else open_index(path)
    scores = index.scores(_sketches(index, task, queries))
    found.influences[name] = scores.influences[:, 0].astype(np.float64)
    found.self_influences[name] = self_influences(index).influences[0, 0].astype(np.float64)
    return index


def _add_steps(found: Predictions, index: Index, task: TrainedTask, queries: Sequence[Any]) -> None:
    sketches = _sketches(index, task, queries)
    for resolve in get_args(Resolve):
        influences = index.scores(sketches, resolve).influences.astype(np.float64)
        for step in range(index.num_steps):
            found.influences[step_name(resolve, step, index.num_steps)] = influences[:, 1 + step]
        if resolve == "same_step":
            found.influences[SAME_STEPS] = influences[:, 1:].sum(1)
    own = _sketches(index, task, task.examples())  # [N, S, W]
    with_all_steps = np.einsum("nsw,nw->sn", own, own.sum(1)).astype(np.float64)
    same = self_influences(index).influences[0, 1:]
    found.self_influences[SAME_STEPS] = same.sum(0).astype(np.float64)
    for step, influences in enumerate(same):
        found.self_influences[step_name("query_step", step, index.num_steps)] = with_all_steps[step]
        found.self_influences[step_name("same_step", step, index.num_steps)] = influences.astype(np.float64)


def _sketches(index: Index, task: TrainedTask, queries: Sequence[Any]) -> np.ndarray:
    return ExampleSketcher(task, index.config).sketch(queries).values.numpy()


@torch.no_grad()
def _losses(task: TrainedTask) -> np.ndarray:
    """[N], the mean over checkpoints."""
    batch = task.collate(task.examples())
    found = [task.losses(task.model(checkpoint), batch) for checkpoint in task.checkpoints()]
    return torch.stack(found).mean(0).double().numpy()


def _reference(task: TrainedTask, queries: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The method's authors' package with exact gradients: influences [Q, N] and self-influences [N]."""
    influences, own = 0.0, 0.0
    for checkpoint in task.checkpoints():
        rows, asked = (_reference_gradients(task, checkpoint, each) for each in (task.examples(), queries))
        influences = influences + checkpoint.learning_rate * (asked @ rows.T).double().numpy()
        own = own + checkpoint.learning_rate * (rows**2).sum(1).double().numpy()
    return np.asarray(influences), np.asarray(own)


def _reference_gradients(task: TrainedTask, checkpoint: Any, examples: Sequence[Any]) -> torch.Tensor:
    """[B, P], summed over steps."""
    import warnings

    from sdi import FullGradientTracInSDI

    model = task.model(checkpoint)
    estimator = FullGradientTracInSDI(
        model=model, target_modules=[model.get_submodule(name) for name in task.loop.body]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # they fire all the same
        features = estimator.featurize_loader(loader=[task.collate(examples)], loss_fn=task.losses)
    estimator.close()
    return torch.cat([values.flatten(2) for values in features.phi.values()], dim=2).sum(1)
