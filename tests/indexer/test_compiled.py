"""Compiled loops give what a loop in Python, or a number type that numpy has, gives."""

from __future__ import annotations

import numba
import numba.core.caching
import numpy as np
import pytest
import torch

from loopsway.indexer.compiled import compiled
from loopsway.indexer.search.inner_loops import group_peaks, reaching, rescale, round_to_bfloat16
from loopsway.indexer.search.planes import bit_planes, write_products


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


@pytest.mark.parametrize("count", [64, 100, 1001])
def test_peaks_of_groups_are_those_of_every_so_many(count: int) -> None:
    values, num_groups = np.random.default_rng(count).standard_normal(count).astype(np.float32), count // 32
    highest, lowest = np.empty(num_groups, np.float32), np.empty(num_groups, np.float32)
    group_peaks(values, num_groups, highest, lowest)
    groups = values[: num_groups * (count // num_groups)].reshape(-1, num_groups)
    np.testing.assert_array_equal(highest, groups.max(0))
    np.testing.assert_array_equal(lowest, groups.min(0))


@pytest.mark.parametrize("room", [0, 3, 1000])
@pytest.mark.parametrize("floor", [0.5, 2.0, 9.0])
def test_places_that_reach_a_floor_are_found_as_far_as_there_is_room(floor: float, room: int) -> None:
    rng = np.random.default_rng(1)
    estimates, lengths = (rng.standard_normal(777).astype(np.float32) for _ in range(2))
    estimates[[5, 700]] = np.nan  # which reaches nothing
    slack, high, low = np.float32(0.3), np.float32(floor), np.float32(floor / 2)
    want = [place for place, (estimate, length) in enumerate(zip(estimates, lengths, strict=True))
            if estimate + length * slack >= high or length * slack - estimate >= low]  # fmt: skip
    out = np.full(room, -1)
    assert reaching(estimates, lengths, slack, high, low, out) == min(len(want), room + 1)
    assert out[: len(want)].tolist() == want[:room]


def test_where_no_cache_can_be_kept_a_loop_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(value: int) -> int:
        return 2 * value

    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(doubled)
    assert compiled(doubled)(4) == 8
