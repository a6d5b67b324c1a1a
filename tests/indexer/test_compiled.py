"""Compiled loops give what a loop in Python, or a number type that numpy has, gives."""

from __future__ import annotations

import numba
import numba.core.caching
import numpy as np
import pytest
import torch

from loopsway.indexer.compiled import compiled
from loopsway.indexer.search.inner_loops import group_peaks, reaching, rescale, round_to_bfloat16, strongest, take_in
from loopsway.indexer.search.planes import (
    EXACT,
    coarse_planes,
    exact_planes,
    sign_sums,
    write_own_products,
    write_planes,
    write_products,
)


def bit_planes(cells: np.ndarray, count: int) -> np.ndarray:
    """Packed bits, uint8 [M, count, W / 8], of cells int32 [M, W], the lowest first."""
    planes, room = np.empty((len(cells), count, cells.shape[1] // 8), np.uint8), np.empty(cells.shape[1], np.uint8)
    for own, written in zip(cells, planes, strict=True):
        write_planes(own, room, written)
    return planes


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("count", [4, 8, 24])
@pytest.mark.parametrize("width", [8, 64, 136, 1024])
def test_products_of_planes_and_sign_codes_are_those_of_whole_numbers(width: int, count: int, kind: type) -> None:
    rng = np.random.default_rng([width, count])
    cells, signs = rng.integers(1 << count, size=(3, width)).astype(np.int32), rng.integers(2, size=(35, width))
    scale, factors = rng.standard_normal(3).astype(kind), rng.standard_normal(35).astype(kind)
    out = np.empty((3, 35), kind)
    write_products(
        np.packbits(signs.astype(np.uint8), axis=1, bitorder="little"), bit_planes(cells, count), scale, factors, out
    )
    products = (2 * cells.astype(np.int64) - (1 << count) + 1) @ (2 * signs - 1).T
    np.testing.assert_allclose(out, products * scale[:, None].astype(float) * factors, rtol=4 * np.finfo(kind).eps)


def test_every_float16_is_rounded_to_the_nearest_bfloat16_or_below_the_normal_ones_to_their_least_or_zero() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7FFF) < 0x7C00].reshape(1, -1)  # all that are finite
    out = np.empty_like(bits)
    round_to_bfloat16(bits, out)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.float16)
    rounded = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    normal = values.abs() >= 2**-14
    assert torch.equal(rounded[normal], values[normal].bfloat16())
    assert ((rounded.double() - values.double()).abs()[~normal] <= 2**-15).all()
    assert set(rounded[~normal].abs().tolist()) == {0.0, 2**-14}


def test_products_are_rescaled_and_turned() -> None:
    rng = np.random.default_rng(0)
    products = rng.integers(-1000, 1000, size=(150, 5)).astype(np.int32)
    offset, scale, factors = (rng.standard_normal(size).astype(np.float32) for size in (5, 5, 150))
    out = np.empty((5, 150), np.float32)
    rescale(products, offset, scale, factors, out)
    np.testing.assert_allclose(out, (products + offset).T * scale[:, None] * factors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [8, 64, 136, 1024])
def test_own_products_and_sums_of_sign_codes_are_those_of_whole_numbers(width: int) -> None:
    rng = np.random.default_rng(width)
    queries, signs = rng.standard_normal((3, width)).astype(np.float32), rng.integers(2, size=(35, width))
    queries[1] = 0
    codes, whose = np.packbits(signs.astype(np.uint8), axis=1, bitorder="little"), rng.integers(3, size=35)
    planes, units = exact_planes(queries)
    bits = np.unpackbits(planes, axis=2, bitorder="little").astype(np.int64)  # [M, P, W]
    levels = 2 * (bits * (1 << np.arange(EXACT))[:, None]).sum(1) - (1 << EXACT)
    np.testing.assert_allclose(levels * units[:, None], queries, rtol=0, atol=2**-22 * np.abs(queries).max())
    out = np.empty(35)
    write_own_products(codes, whose, planes, units, out)
    assert out.tolist() == [
        (levels[query] @ (2 * own - 1)) * units[query] for query, own in zip(whose, signs, strict=True)
    ]
    assert sign_sums(codes).tolist() == (2 * signs - 1).sum(1).tolist()


@pytest.mark.parametrize("count", [4, 8])
def test_what_coarse_planes_take_from_a_query_is_orthogonal_to_it_and_as_long_as_they_say(count: int) -> None:
    rng = np.random.default_rng(count)
    queries = (rng.standard_normal((4, 1024)) * [[1], [1e-30], [1e15], [0]]).astype(np.float32)
    planes, scale, rests, lengths, peaks = coarse_planes(queries, count)
    assert peaks.tolist() == [*np.abs(queries[:3]).max(1), 1]
    bits = np.unpackbits(planes, axis=2, bitorder="little").astype(np.int64)
    levels = 2 * (bits * (1 << np.arange(count))[:, None]).sum(1) - (1 << count) + 1
    unit, coded = queries.astype(float) / peaks[:, None], scale[:, None].astype(float) * levels
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), lengths, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit - coded, axis=1), rests, rtol=1e-4)
    assert (np.abs(((unit - coded) * unit).sum(1)) <= 1e-6 * lengths**2).all()


@pytest.mark.parametrize("count", [64, 100, 1001])
def test_peaks_of_groups_are_those_of_every_so_many(count: int) -> None:
    values, num_groups = np.random.default_rng(count).standard_normal((3, count)).astype(np.float32), count // 32
    highest, lowest = np.empty((3, num_groups), np.float32), np.empty((3, num_groups), np.float32)
    group_peaks(values, highest, lowest)
    groups = values[:, : num_groups * (count // num_groups)].reshape(3, -1, num_groups)
    np.testing.assert_array_equal(highest, groups.max(1))
    np.testing.assert_array_equal(lowest, groups.min(1))


@pytest.mark.parametrize("room", [0, 3, 1000])
@pytest.mark.parametrize("floor", [0.5, 2.0, 9.0])
def test_places_that_reach_a_floor_are_found_as_far_as_there_is_room(floor: float, room: int) -> None:
    rng = np.random.default_rng(1)
    estimates, lengths = (rng.standard_normal(size).astype(np.float32) for size in ((2, 777), 777))
    estimates[:, [5, 700]] = np.nan  # which reaches nothing
    slack, high, low = (np.array(each, np.float32) for each in ((0.3, 0), (floor, floor), (floor / 2, 9)))
    out, counts = np.full((2, room), -1), np.empty(2, np.int64)
    reaching(estimates, lengths, slack, high, low, out, counts)
    for query, own in enumerate(estimates):
        widths = lengths * slack[query]
        want = np.flatnonzero((own + widths >= high[query]) | (widths - own >= low[query])).tolist()
        assert counts[query] == min(len(want), room + 1)
        assert out[query, : len(want)].tolist() == want[:room]


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("kinds", [2, 7, 1000])  # of scores: many equal ones, or few
def test_the_best_of_either_sign_are_those_of_a_sort(kinds: int, k: int) -> None:
    rng = np.random.default_rng([kinds, k])
    rows, scores = np.zeros((3, 2 * k), np.int64), np.zeros((3, 2 * k), np.float32)
    counts, seen = np.zeros(3, np.int64), [dict[int, float]() for _ in range(3)]
    for _ in range(6):
        numbers, own = rng.permutation(3)[:2], rng.integers(0, 30, size=2)
        new = [rng.choice(sorted(set(range(1000)) - seen[query].keys()), count, replace=False)
               for query, count in zip(numbers, own, strict=True)]  # fmt: skip
        values = [rng.integers(-kinds, kinds, size=count).astype(np.float32) for count in own]
        for query, each, score in zip(numbers, new, values, strict=True):
            each.sort()
            seen[query] |= dict(zip(each.tolist(), score.tolist(), strict=True))
        take_in(numbers, np.cumsum(own), np.concatenate(new), np.concatenate(values), rows, scores, counts)
    for query, known in enumerate(seen):
        best, worst = (sorted(known, key=lambda row, sign=sign: (sign * known[row], row))[:k] for sign in (-1, 1))
        want = sorted({*best, *worst}, key=lambda row: (-known[row], row))
        assert rows[query, : counts[query]].tolist() == want
        assert scores[query, : counts[query]].tolist() == [known[row] for row in want]


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("kinds", [2, 7, 1000])
def test_the_strongest_of_each_query_are_those_of_a_sort(kinds: int, k: int) -> None:
    rng = np.random.default_rng([kinds, k])
    scores = [-np.sort(rng.integers(-kinds, kinds, size=count)).astype(np.float32) for count in (0, 30, 1, 70)]
    starts, ends = np.cumsum([0, 0, 30, 1]), np.cumsum([0, 30, 1, 70])
    places, counts = np.empty(101, np.int64), np.empty((4, 2), np.int64)
    strongest(np.concatenate(scores), ends, k, places, counts)
    found = [each.tolist() for each in np.split(places, np.cumsum(counts))[:-1]]
    for query, own in enumerate(scores):
        for sign in (1, -1):
            live = [place for place in range(len(own)) if sign * own[place] > 0]
            want = sorted(live, key=lambda place, own=own, sign=sign: (-sign * own[place], place))[:k]
            assert found.pop(0) == [place + starts[query] for place in want]


def test_where_no_cache_can_be_kept_a_loop_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(value: int) -> int:
        return 2 * value

    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(doubled)
    assert compiled(doubled)(4) == 8
