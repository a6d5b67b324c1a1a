"""Hashes never change, and contiguous columns estimate as well as independent ones or better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopsway.indexer.gradients import Dense
from loopsway.indexer.hashes import parameter_hash, rotation_signs
from loopsway.indexer.sketch import DeviceHash, Sketches

TRIALS = 1500
WIDTH = 64


def test_the_construction_is_frozen() -> None:
    """These numbers are in every index on disk: if they change, raise CONSTRUCTION."""
    hashed = parameter_hash(7, "step-100", "block.mlp.0.weight", (3, 5), 1024)
    assert hashed.row_buckets.tolist() == [941, 553, 121]
    assert hashed.row_signs.tolist() == [-1, -1, -1]
    assert hashed.column_buckets.tolist() == [2, 3, 4, 5, 6]
    assert hashed.column_signs.tolist() == [1, 1, 1, 1, -1]
    assert rotation_signs(7, 64)[:8].tolist() == [-1, -1, -1, -1, -1, 1, -1, -1]


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


def test_columns_of_a_row_never_collide_within_a_width() -> None:
    columns = parameter_hash(0, "a", "w", (2, 150), 64).column_buckets
    for segment in (columns[:64], columns[64:128], columns[128:]):
        assert len(set(segment.tolist())) == len(segment)
        assert set(np.diff(segment) % 64) <= {1}


def matrices(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that are hard for structured hashes."""
    rng = np.random.default_rng(0)
    rows, columns = {"row": (1, 100), "column": (100, 1)}.get(kind, (12, 90))
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


@pytest.mark.parametrize("kind", ["dense", "rank one", "constant", "diagonal", "toeplitz", "row", "column"])
def test_the_estimate_is_unbiased_and_its_variance_within_the_bound(kind: str) -> None:
    a, b = matrices(kind)
    values = torch.from_numpy(np.stack([a.ravel(), b.ravel()])).float()
    shape, device = a.shape, torch.device("cpu")
    estimates = []
    for seed in range(TRIALS):
        hashes = DeviceHash.of_parameters({"w": shape}, width=WIDTH, seed=seed, checkpoint="a", device=device)
        sink = Sketches(hashes, 2, 1, width=WIDTH, layer_path="auto", device=device)
        sink.add("w", 0, Dense(values))
        estimates.append(float(sink.values[0, 0] @ sink.values[1, 0]))
    exact = np.sum(a * b)
    bound = np.sum(a * a) * np.sum(b * b) + exact**2 + 2 * np.sum((a.T @ b) ** 2) + 2 * np.sum((a @ b.T) ** 2)
    mean, variance = np.mean(estimates), np.var(estimates, ddof=1)
    assert abs(mean - exact) < 4 * np.sqrt(variance / TRIALS), f"biased: mean {mean:.1f}, exact {exact:.1f}"
    noise = np.sqrt((np.mean((np.array(estimates) - mean) ** 4) - variance**2) / TRIALS)
    ratio = variance / (bound / WIDTH)
    assert variance - bound / WIDTH < 3 * noise, f"variance is {ratio:.2f} of its bound: columns collide too often"
