"""Hashes never change; contiguous columns estimate as well as independent ones or better, grouped rows as stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopsway.indexer.gradients import Dense
from loopsway.indexer.hashes import GROUPS_PER_BUCKET, parameter_hash, rotation_signs, row_groups
from loopsway.indexer.sketch import DeviceHash, Sketches

TRIALS = 1500
WIDTH = 64


def test_the_construction_is_frozen() -> None:
    """These numbers are in every index on disk: if they change, raise CONSTRUCTION."""
    hashed = parameter_hash(7, "step-100", "block.mlp.0.weight", (3, 5), 1024)
    assert hashed.row_buckets.tolist() == [111, 489, 534]
    assert hashed.row_signs.tolist() == [1, -1, 1]
    assert hashed.column_buckets.tolist() == [308, 309, 310, 311, 312]
    assert hashed.column_signs.tolist() == [1, 1, -1, 1, -1]
    assert rotation_signs(7, 64)[:8].tolist() == [-1, -1, -1, -1, 1, 1, -1, -1]


def test_the_construction_of_row_groups_is_frozen() -> None:
    hashed = parameter_hash(7, "step-100", "head.weight", (400, 2), 64, row_bucketing=True)
    assert hashed.row_groups == 160
    assert hashed.row_shifts.tolist() == [99, 150, 1]
    assert hashed.row_buckets[[0, 1, 2, 160, 161, 162, 399]].tolist() == [50, 21, 14, 60, 2, 51, 27]
    plain = parameter_hash(7, "step-100", "head.weight", (400, 2), 64)
    assert np.array_equal(hashed.row_signs, plain.row_signs)
    assert (plain.row_groups, plain.row_shifts.tolist()) == (400, [0])


def test_only_rows_that_grouping_halves_are_grouped() -> None:
    assert [row_groups(rows, 64) for rows in (1, 319, 320, 10_000)] == [1, 319, 160, 160]
    grouped, plain = (parameter_hash(0, "a", "w", (319, 3), 64, row_bucketing=on) for on in (True, False))
    assert np.array_equal(grouped.row_buckets, plain.row_buckets)


def test_row_groups_are_of_equal_size_and_rows_of_two_blocks_meet_as_if_by_chance() -> None:
    rows, groups, seeds = 470, 160, 400
    meetings = 0
    for seed in range(seeds):
        hashed = parameter_hash(seed, "a", "w", (rows, 1), 64, row_bucketing=True)
        group_of = (np.arange(rows) + hashed.row_shifts.repeat(groups)[:rows]) % groups
        assert set(np.bincount(group_of)) <= {rows // groups, rows // groups + 1}
        assert all(len(set(hashed.row_buckets[group_of == group])) == 1 for group in range(0, groups, 40))
        meetings += int(group_of[3] == group_of[200]) + int(group_of[5] == group_of[333])
    expected = 2 * seeds / groups
    assert abs(meetings - expected) < 4 * np.sqrt(expected), f"{meetings} meetings, expected {expected:.0f}"


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


@pytest.mark.parametrize("kind", ["dense", "rank one", "constant", "diagonal", "toeplitz", "column"])
def test_grouped_rows_are_unbiased_too_and_their_variance_within_its_bound(kind: str) -> None:
    a, b = matrices(kind, rows=330)
    estimates = inner_products(a, b, row_bucketing=True)
    assert_unbiased(estimates, np.sum(a * b))
    groups = row_groups(len(a), WIDTH)
    assert groups == GROUPS_PER_BUCKET * WIDTH < len(a) / 2
    bound = variance_bound(a, b) + 2 * np.sum((a @ b.T) ** 2) / groups
    assert_within(estimates, bound, "rows meet too often")
    ungrouped = inner_products(a, b)
    ratio = np.var(estimates) / np.var(ungrouped)
    noise = np.hypot(variance_noise(estimates), variance_noise(ungrouped)) / np.var(ungrouped)
    worst = 1 + 1 / GROUPS_PER_BUCKET
    assert ratio < worst + 3 * noise, f"grouping makes the variance {ratio:.2f} times as large, stated is {worst}"


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_width_the_variance_is_that_of_one_hash_for_each_entry(kind: str) -> None:
    """Low rank adds nothing, where it triples that of a TensorSketch of independent rows and columns."""
    a, b = (matrix[:WIDTH, : WIDTH // 2] for matrix in matrices(kind))
    squares = np.sum(a * a) * np.sum(b * b) + np.sum(a * b) ** 2
    assert_within(inner_products(a, b), squares / (WIDTH - 1), "rows or columns collide too often")


def inner_products(a: np.ndarray, b: np.ndarray, *, row_bucketing: bool = False) -> np.ndarray:
    """Estimates of <a, b>, one for each seed."""
    values = torch.from_numpy(np.stack([a.ravel(), b.ravel()])).float()
    shape, device = a.shape, torch.device("cpu")
    estimates = []
    for seed in range(TRIALS):
        hashes = DeviceHash.of_parameters(
            {"w": shape}, width=WIDTH, seed=seed, checkpoint="a", device=device, row_bucketing=row_bucketing
        )
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
