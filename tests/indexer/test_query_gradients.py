"""A query sent as its gradients has the sketch of the query itself, in whatever form and pieces they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from layers import CELLS, Looped
from looped import MODELS, InjectedModel, LoopedTask, collate, losses, make_examples, make_model
from loops import UsedOutside
from loopsway.indexer import (
    Checkpoint,
    ExampleSketcher,
    GradientError,
    GradientSketcher,
    SketchConfig,
    StepSketcher,
    query_gradients,
)
from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, QueryGradients, RowGradient

CONFIG = SketchConfig(width=512)
TOLERANCE = 1e-5
BATCH = collate(make_examples(5))
KINDS = {kind.__name__: kind for kind in (*MODELS, UsedOutside)}
CHECKPOINTS = [Checkpoint(name="early", learning_rate=0.3), Checkpoint(name="late", learning_rate=0.01)]


def model_of(name: str, seed: int) -> Any:
    return make_model(Looped, seed, name=name) if name in CELLS else make_model(KINDS[name], seed)


def sketched(sketcher: GradientSketcher, query: QueryGradients, pieces: Sequence[GradientPiece] | None = None) -> Any:
    sketch = sketcher.begin(query.num_steps)
    for piece in query.pieces if pieces is None else pieces:
        sketch.add(piece)
    return sketch.finish()


def dense(piece: GradientPiece, shape: tuple[int, ...]) -> DenseGradient:
    """The whole parameter's entries, by numpy alone."""
    out = np.zeros(shape)
    match piece:
        case FactoredGradient():
            out += piece.output_gradients.T.astype(np.float64) @ piece.inputs
        case RowGradient():
            np.add.at(out, piece.rows, piece.values)
        case DenseGradient():
            out.reshape(-1)[piece.start : piece.start + piece.values.size] += piece.values.ravel()
    return DenseGradient(checkpoint=piece.checkpoint, parameter=piece.parameter, step=piece.step, values=out)


def error_of(got: NDArray[Any], want: NDArray[Any]) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", [*CELLS, *KINDS])
def test_factors_and_dense_gradients_have_the_sketch_of_the_example(name: str) -> None:
    models = {checkpoint.name: model_of(name, seed) for seed, checkpoint in enumerate(CHECKPOINTS)}
    loop = models["early"].loop
    sketchers = [StepSketcher(models[each.name], loop, CONFIG, checkpoint=each) for each in CHECKPOINTS]
    want = sum(each.sketch(losses, BATCH) for each in sketchers).numpy()  # type: ignore[union-attr]
    shapes = sketchers[0].parameters
    sketcher = GradientSketcher.without_model(shapes, CHECKPOINTS, CONFIG)
    for query, expected in zip(query_gradients(models, loop, losses, BATCH), want, strict=True):
        assert error_of(sketched(sketcher, query), expected) <= TOLERANCE
        whole = [dense(piece, shapes[piece.parameter]) for piece in query.pieces]
        assert error_of(sketched(sketcher, query, whole), expected) <= TOLERANCE


def test_an_optimizer_aware_index_scales_gradients_with_its_tasks_second_moments() -> None:
    class Aware(LoopedTask):
        def second_moments(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(len(checkpoint.name))
            return {
                name: (4 * torch.randn(parameter.shape, generator=generator) - 8).exp()
                for name, parameter in self.model(checkpoint).named_parameters()
            }

    task, config = Aware(), replace(CONFIG, optimizer_aware=True)
    examples = task.examples()[:3]
    sketcher = ExampleSketcher(task, config)
    want = sketcher.sketch(examples).values.numpy()
    models = {checkpoint.name: task.model(checkpoint) for checkpoint in task.checkpoints()}
    queries = query_gradients(models, task.loop, task.losses, task.collate(examples))
    for query, expected in zip(queries, want, strict=True):
        assert error_of(sketched(sketcher.gradient_sketcher(), query), expected) <= TOLERANCE
    with pytest.raises(GradientError, match="sketch where the task is"):
        GradientSketcher.without_model(sketcher.parameters, sketcher.checkpoints, config)


def test_pieces_may_be_cut_anywhere_and_come_in_any_order_and_precision() -> None:
    model = make_model(InjectedModel)
    sketcher = GradientSketcher.without_model(
        StepSketcher(model, model.loop, CONFIG).parameters, [Checkpoint(name="a", learning_rate=1)], CONFIG
    )
    (query,) = query_gradients({"a": model}, model.loop, losses, {key: each[:1] for key, each in BATCH.items()})
    want = sketched(sketcher, query)
    pieces: list[GradientPiece] = []
    for piece in query.pieces:
        whole = dense(piece, sketcher.shapes[piece.parameter])
        flat = whole.values.ravel()
        cuts = sorted({0, *np.random.default_rng(0).integers(0, flat.size, 3).tolist(), flat.size})
        for start, end in pairwise(cuts):
            pieces.append(replace(whole, values=flat[start:end], start=start))
    order = np.random.default_rng(1).permutation(len(pieces))
    assert error_of(sketched(sketcher, query, [pieces[at] for at in order]), want) <= TOLERANCE


def piece(kind: type[GradientPiece], **values: Any) -> GradientPiece:
    return kind(**{"checkpoint": "a", "parameter": "block.out.weight", "step": 0, **values})


ONES, ROWS = np.ones((2, 12), np.float32), np.array([3, 3])
WRONG: dict[str, tuple[Callable[[], GradientPiece], str]] = {
    "checkpoint": (lambda: piece(DenseGradient, values=ONES, checkpoint="b"), "no checkpoint 'b', only a"),
    "parameter": (lambda: piece(DenseGradient, values=ONES, parameter="head.bias"), "no parameter 'head.bias'"),
    "step": (lambda: piece(DenseGradient, values=ONES, step=4), "step is 4, expected 0 to 3"),
    "negative step": (lambda: piece(DenseGradient, values=ONES, step=-1), "step is -1"),
    "too many": (lambda: piece(DenseGradient, values=ONES, start=121), "has 144 entries, the piece has 24 from 121"),
    "negative start": (lambda: piece(DenseGradient, values=ONES, start=-1), "24 from -1"),
    "empty": (lambda: piece(DenseGradient, values=ONES[:0]), "expected floats, at least one"),
    "integers": (lambda: piece(DenseGradient, values=ROWS), "is int64"),
    "nan": (lambda: piece(DenseGradient, values=np.full((1, 12), np.nan)), "infinite, not a number or beyond"),
    "overflow": (lambda: piece(DenseGradient, values=np.full((1, 12), 1e300)), "beyond float32"),
    "swapped factors": (
        lambda: piece(FactoredGradient, parameter="block.qkv.weight", output_gradients=ONES, inputs=np.ones((2, 36))),
        r"shapes \[2, 12\] and \[2, 36\], expected \[T, 36\] \(output gradients\) and \[T, 12\] \(inputs\)",
    ),
    "two lengths": (lambda: piece(FactoredGradient, output_gradients=ONES, inputs=ONES[:1]), "of one T"),
    "factors of a vector": (
        lambda: piece(FactoredGradient, parameter="block.out.bias", output_gradients=ONES, inputs=ONES),
        r"has shape \[12\] and is no matrix: send its entries, not factors",
    ),
    "row beyond": (lambda: piece(RowGradient, rows=np.array([0, 12]), values=ONES), "has 12 rows, .* names 0 to 12"),
    "negative row": (lambda: piece(RowGradient, rows=np.array([-1, 2]), values=ONES), "names -1 to 2"),
    "rows and values": (lambda: piece(RowGradient, rows=ROWS[:1], values=ONES), r"expected int64 \[n\] and \[n, 12\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_gradient_of_the_index_is_refused_by_name(case: str) -> None:
    model = make_model(InjectedModel)
    shapes = StepSketcher(model, model.loop, CONFIG).parameters
    sketch = GradientSketcher.without_model(shapes, [Checkpoint(name="a", learning_rate=1)], CONFIG).begin(4)
    made, text = WRONG[case]
    with pytest.raises(GradientError, match=text):
        sketch.add(made())
    assert not sketch.finish().any()


def test_sums_beyond_float32_are_refused() -> None:
    sketcher = GradientSketcher.without_model({"w": (4, 4)}, CHECKPOINTS, CONFIG).begin(1)
    for _ in range(9):
        sketcher.add(piece(DenseGradient, values=np.full((4, 4), 2e38), parameter="w", checkpoint="early"))
    with pytest.raises(GradientError, match="scale the loss down"):
        sketcher.finish()


def test_models_of_different_numbers_of_steps_are_refused() -> None:
    models = {"a": make_model(InjectedModel), "b": make_model(InjectedModel, num_steps=3)}
    with pytest.raises(ValueError, match=r"different numbers of steps, \[3, 4\]"):
        query_gradients(models, InjectedModel.loop, losses, BATCH)
    with pytest.raises(ValueError, match="models is empty"):
        query_gradients({}, InjectedModel.loop, losses, BATCH)
