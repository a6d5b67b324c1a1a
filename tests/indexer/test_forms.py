"""Whatever its form, pieces, order, tiles and path, a gradient gives one sketch; scales included."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients.forms import Dense, Gradient, OuterProduct, TableRows
from loopsway.indexer.sketches import accumulator
from loopsway.indexer.sketches.sketch import DeviceHash, ExactGradients, GradientSink, Sketches

TRIALS = 200
WIDTH = 64
CPU = torch.device("cpu")


def new_sketches(
    shapes: Any,
    batch: int,
    num_steps: int,
    *,
    layer_path: LayerPath = "auto",
    scales: Any = None,
) -> Sketches:
    hashes = DeviceHash.of_parameters(shapes, width=WIDTH, seed=0, checkpoint="single", device=CPU)
    return Sketches(hashes, batch, num_steps, width=WIDTH, layer_path=layer_path, device=CPU, scales=scales)


def test_tiles_do_not_change_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(3, 5, 20), torch.randn(3, 5, 70)
    whole, tiled = (new_sketches({"w": (20, 70)}, 3, 1) for _ in range(2))
    fourier = new_sketches({"w": (20, 70)}, 3, 1, layer_path="fourier")
    whole.add("w", 0, OuterProduct(left, right))
    monkeypatch.setattr("loopsway.indexer.sketches.sketch.PRODUCT_BYTES", 4 * 70 * 7)
    tiled.add("w", 0, OuterProduct(left, right))
    fourier.add("w", 0, OuterProduct(left, right))
    torch.testing.assert_close(whole.values, tiled.values)
    torch.testing.assert_close(whole.values, fourier.values, rtol=1e-4, atol=1e-3)


def forms(rows: int, columns: int, batch: int = 2, tokens: int = 3) -> list[Gradient]:
    """One gradient in each form."""
    generator = torch.Generator().manual_seed(0)
    looked_up = torch.randint(0, rows, (batch, tokens), generator=generator)
    values = torch.randn(batch, tokens, columns, generator=generator)
    one_hot = torch.nn.functional.one_hot(looked_up, rows).float()
    dense = torch.einsum("btr,btc->brc", one_hot, values).flatten(1)
    return [Dense(dense), TableRows(looked_up, values), OuterProduct(one_hot, values)]


def sinks(shape: tuple[int, ...], scale: Tensor | None, layer_path: LayerPath = "auto") -> list[GradientSink]:
    scales = None if scale is None else {"w": scale}
    return [
        new_sketches({"other": (3,), "w": shape}, 2, 2, layer_path=layer_path, scales=scales),
        ExactGradients({"other": (3,), "w": shape}, 2, 2, device=CPU, scales=scales),
    ]


# More columns than the sketch has buckets, and fewer; rows that are grouped are in tests of their own.
@pytest.mark.parametrize("shape", [(4, 6), (5, 150), (1, 70)])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_form_of_a_gradient_gives_the_same_sketch_and_the_same_exact_rows(
    shape: tuple[int, int], scaled: bool
) -> None:
    scale = 0.1 + torch.rand(shape) if scaled else None
    dense, *others = forms(*shape)
    assert isinstance(dense, Dense)
    scaled_by_hand = Dense(dense.values * (1 if scale is None else scale.flatten()))
    for position in range(2):
        expected = sinks(shape, None)[position]
        expected.add("w", 1, scaled_by_hand)
        assert expected.values[:, 0].count_nonzero() == 0
        for form in (dense, *others):
            sink = sinks(shape, scale)[position]
            sink.add("w", 1, form)
            torch.testing.assert_close(sink.values, expected.values)


@pytest.mark.parametrize(
    ("shape", "cuts"), [((6, 5), (0, 10, 15, 30)), ((30,), (0, 1, 17, 30)), ((200,), (0, 50, 70, 190, 200)),
                        ((3, 4, 20), (0, 33, 240)), ((4, 100), (0, 100, 400))],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_may_come_in_pieces(shape: tuple[int, ...], cuts: tuple[int, ...], scaled: bool) -> None:
    """Whole rows of a matrix; any stretch of anything else, past the width too."""
    scale = 0.1 + torch.rand(shape) if scaled else None
    values = torch.randn(2, int(np.prod(shape)))
    for whole, pieces in zip(sinks(shape, scale), sinks(shape, scale), strict=True):
        whole.add("w", 1, Dense(values))
        for start, stop in pairwise(cuts):
            pieces.add("w", 1, Dense(values[:, start:stop], start))
        torch.testing.assert_close(whole.values, pieces.values)


def test_steps_may_come_in_any_order() -> None:
    gradients = {step: torch.randn(2, 24) for step in range(3)}
    ordered, mixed = (new_sketches({"w": (4, 6)}, 2, 3) for _ in range(2))
    for step, gradient in gradients.items():
        ordered.add("w", step, Dense(gradient))
    for step in (2, 0, 1, 2, 0, 1):
        mixed.add("w", step, Dense(gradients[step] / 2))
        assert mixed.values[:, step].count_nonzero() > 0
    torch.testing.assert_close(ordered.values, mixed.values)


def test_scaled_entries_are_refused_on_the_fourier_path_and_multiplied_out_where_it_would_be_cheaper() -> None:
    shape = (600, 600)
    scales = {"w": torch.rand(shape)}
    with pytest.raises(ValueError, match='optimizer_aware=True asks for; use layer_path="auto" or "product"'):
        new_sketches({"w": shape}, 1, 1, layer_path="fourier", scales=scales)
    gradient = OuterProduct(torch.randn(1, 1, 600), torch.randn(1, 1, 600))
    for scaled, path in ((None, "fourier"), (scales, "product")):
        sink = new_sketches({"w": shape}, 1, 1, scales=scaled)
        sink.add("w", 0, gradient)
        assert sink.costs["w"].path == path


@pytest.mark.parametrize("shape", [(40, 30), (5, 150)])
def test_without_overlapping_views_the_sketch_is_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    assert accumulator._overlapping_views_add_up(), "this release of torch is slow here; is it a tested one?"
    for form in forms(*shape):
        fast, slow = (new_sketches({"w": shape}, 2, 1) for _ in range(2))
        fast.add("w", 0, form)
        with monkeypatch.context() as patch:
            patch.setattr(accumulator, "_overlapping_views_add_up", lambda: False)
            slow.add("w", 0, form)
        torch.testing.assert_close(fast.values, slow.values)


def test_a_torch_that_loses_writes_through_overlapping_views_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfold(self: Tensor, dimension: int, size: int, step: int) -> Tensor:
        """Every write is lost."""
        return original(self, dimension, size, step).clone()

    original = Tensor.unfold
    monkeypatch.setattr(Tensor, "unfold", unfold)
    assert not accumulator._overlapping_views_add_up.__wrapped__()
