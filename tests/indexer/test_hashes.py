"""Hashes never change; contiguous columns estimate as well as independent ones or better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopsway.indexer.gradients.forms import Dense
from loopsway.indexer.sketches.hashes import parameter_hash, rotation_signs
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

TRIALS = 1500
WIDTH = 64


def test_the_construction_is_frozen() -> None:
    """These numbers are in every index on disk: if they change, raise CONSTRUCTION."""
    hashed = parameter_hash(7, "step-100", "block.mlp.0.weight", (3, 5), 1024)
    assert hashed.row_buckets.tolist() == [111, 489, 534]
    assert hashed.row_signs.tolist() == [1, -1, 1]
    assert hashed.column_buckets.tolist() == [308, 309, 310, 311, 312]
    assert hashed.column_signs.tolist() == [1, 1, -1, 1, -1]
    assert rotation_signs(7, 64, 0)[:8].tolist() == [-1, -1, -1, -1, 1, 1, -1, -1]
    assert not np.array_equal(rotation_signs(7, 64, 1), rotation_signs(7, 64, 0))


@pytest.mark.parametrize("other", [(1, "a", "w", (4, 4)), (0, "b", "w", (4, 4)), (0, "a", "v", (4, 4))])
def test_each_part_of_the_key_gives_other_hashes(other: tuple[int, str, str, tuple[int, ...]]) -> None:
    first, second = parameter_hash(0, "a", "w", (4, 4), 1 << 16), parameter_hash(*other, 1 << 16)
    assert not np.array_equal(first.row_buckets, second.row_buckets)


def test_buckets_are_uniform_and_signs_even() -> None:
    hashed = parameter_hash(0, "a", "w", (64_000, 1), 64)
    counts = np.bincount(hashed.row_buckets, minlength=64)
    assert len(counts) == 64
    chi_square = np.sum((counts - 1000) ** 2 / 1000)
    assert chi_square < 63 + 5 * np.sqrt(2 * 63), "buckets are not uniform"
    assert abs(hashed.row_signs.sum()) < 5 * np.sqrt(64_000)
    assert abs(np.corrcoef(hashed.row_signs, hashed.row_buckets)[0, 1]) < 5 / np.sqrt(64_000)


def test_rows_never_collide_as_a_whole_within_a_width() -> None:
    rows = parameter_hash(0, "a", "w", (150, 2), 64).row_buckets
    for chunk in (rows[:64], rows[64:128], rows[128:]):
        assert len(set(chunk.tolist())) == len(chunk)


def test_columns_of_a_row_never_collide_within_a_width() -> None:
    columns = parameter_hash(0, "a", "w", (2, 150), 64).column_buckets
    for segment in (columns[:64], columns[64:128], columns[128:]):
        assert len(set(segment.tolist())) == len(segment)
        assert set(np.diff(segment) % 64) <= {1}


def matrices(kind: str, rows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that are hard for structured hashes."""
    rng = np.random.default_rng(0)
    rows, columns = {"row": (1, 100), "column": (max(rows, 100), 1)}.get(kind, (rows, 90))
    first = rng.standard_normal((rows, columns))
    if kind == "rank one":
        first = rng.standard_normal((rows, 1)) @ rng.standard_normal((1, columns))
    elif kind == "constant":
        first = np.ones((rows, columns))
    elif kind == "diagonal":
        first = np.eye(rows, columns)
    elif kind == "toeplitz":
        first = rng.standard_normal(rows + columns)[np.arange(rows)[:, None] + np.arange(columns)]
    return first, first + 0.5 * rng.standard_normal((rows, columns))


KINDS = ("dense", "rank one", "constant", "diagonal", "toeplitz", "row", "column")


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_unbiased_and_its_variance_within_the_bound(kind: str) -> None:
    a, b = matrices(kind)
    estimates = inner_products(a, b)
    assert_unbiased(estimates, np.sum(a * b))
    assert_within(estimates, variance_bound(a, b), "columns collide too often")


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_width_the_variance_is_that_of_one_hash_for_each_entry(kind: str) -> None:
    """Low rank adds nothing, where it triples that of a TensorSketch of independent rows and columns."""
    a, b = (matrix[:WIDTH, : WIDTH // 2] for matrix in matrices(kind))
    squares = np.sum(a * a) * np.sum(b * b) + np.sum(a * b) ** 2
    assert_within(inner_products(a, b), squares / (WIDTH - 1), "rows or columns collide too often")


def inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimates of <a, b>, one for each seed."""
    values = torch.from_numpy(np.stack([a.ravel(), b.ravel()])).float()
    shape, device = a.shape, torch.device("cpu")
    estimates = []
    for seed in range(TRIALS):
        hashes = DeviceHash.of_parameters({"w": shape}, width=WIDTH, seed=seed, checkpoint="a", device=device)
        sink = Sketches(hashes, 2, 1, width=WIDTH, layer_path="auto", device=device)
        sink.add("w", 0, Dense(values))
        sketches = sink.values[:, 0].double()
        estimates.append(float(sketches[0] @ sketches[1]))
    return np.array(estimates)


def variance_bound(a: np.ndarray, b: np.ndarray) -> float:
    squares = np.sum(a * a) * np.sum(b * b) + np.sum(a * b) ** 2
    return (squares + 2 * np.sum((a.T @ b) ** 2) + 2 * np.sum((a @ b.T) ** 2)) / WIDTH


def assert_unbiased(estimates: np.ndarray, exact: float) -> None:
    mean, error = estimates.mean(), estimates.std(ddof=1) / np.sqrt(TRIALS)
    assert abs(mean - exact) < 4 * error, f"biased: mean {mean:.1f}, exact {exact:.1f}"


def variance_noise(estimates: np.ndarray) -> float:
    """Standard error of the variance of the estimates."""
    return np.sqrt((np.mean((estimates - estimates.mean()) ** 4) - np.var(estimates) ** 2) / TRIALS)


def assert_within(estimates: np.ndarray, bound: float, diagnosis: str) -> None:
    variance = np.var(estimates, ddof=1)
    excess = variance - bound
    assert excess < 3 * variance_noise(estimates), f"variance is {variance / bound:.2f} of its bound: {diagnosis}"
