"""The planner's choices are those of its prices, and the sketches keep account of what each parameter took."""

from __future__ import annotations

import pytest
import torch

from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients.forms import Dense, Gradient, OuterProduct, TableRows
from loopsway.indexer.sketches.planner import PathCost, choose_path
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

CPU = torch.device("cpu")


def test_the_product_is_taken_for_small_layers_and_fourier_for_huge_ones_at_few_tokens() -> None:
    assert choose_path(128, 256, 256, 8192) == "product"
    assert choose_path(1, 20_000, 20_000, 8192) == "fourier"


@pytest.mark.parametrize(
    ("gradient", "shape", "layer_path", "path"),
    [
        (OuterProduct(torch.ones(2, 3, 400), torch.ones(2, 3, 5)), (400, 5), "product", "product"),
        (OuterProduct(torch.ones(2, 3, 400), torch.ones(2, 3, 5)), (400, 5), "fourier", "fourier"),
        (TableRows(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 5)), (400, 5), "auto", "rows"),
        (Dense(torch.ones(2, 7)), (7,), "auto", "dense"),
    ],
)
def test_each_path_is_named_counted_priced_and_timed(
    gradient: Gradient, shape: tuple[int, ...], layer_path: LayerPath, path: str
) -> None:
    sketches = new_sketches(shape, layer_path)
    assert sketches.costs == {}
    sketches.add("w", 0, gradient)
    first = sketches.costs["w"]
    assert (first.path, first.calls) == (path, 1)
    once = first.expected_ns
    sketches.add("w", 0, gradient)
    assert (first.path, first.calls) == (path, 2)
    assert first.expected_ns == 2 * once > 0
    assert first.measured_s is not None
    assert first.measured_s > 0


def test_a_parameter_used_in_two_ways_names_both() -> None:
    cost = PathCost(path="rows")
    for path in ("rows", "product", "rows"):
        cost.count(path, 1.0, None)
    assert cost == PathCost(path="rows + product", calls=3, expected_ns=3.0, measured_s=None)


def new_sketches(shape: tuple[int, ...], layer_path: LayerPath) -> Sketches:
    hashes = DeviceHash.of_parameters({"w": shape}, width=64, seed=0, checkpoint="a", device=CPU)
    return Sketches(hashes, 2, 1, width=64, layer_path=layer_path, device=CPU)
