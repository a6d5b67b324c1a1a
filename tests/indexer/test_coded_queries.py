"""Estimates are off by no more than their slack, also of rows that are like the query."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loopsway.indexer.config import BITS
from loopsway.indexer.search.coded_queries import MORE_PLANES, PLANES, code_queries
from loopsway.indexer.sketches.coding import decode, encode

from .test_compiled import bit_planes
from .test_scan import NO_PAIRS, PAIRS, force

COUNT = 1500  # rows: more than a tile
LIKE = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1)  # cosines of rows and query
DEPTHS = [(1, PLANES), (1, MORE_PLANES), *((bits, PLANES) for bits in BITS[1:])]


def rows_like(query: np.ndarray, cosine: float, count: int) -> np.ndarray:
    noise = np.random.default_rng(7).standard_normal((count, len(query)))
    return cosine * query + math.sqrt(1 - cosine**2) * np.linalg.norm(query) / math.sqrt(len(query)) * noise


def errors(queries: np.ndarray, rows: np.ndarray, bits: int, planes: int) -> np.ndarray:
    """Of estimates, over their slack, [M, n]; as if all factors were 1."""
    codes = encode(torch.from_numpy(rows.astype(np.float32)), bits).codes
    values = decode(codes, np.ones(len(codes), np.float32), bits).astype(np.float64)
    coded = code_queries(queries, bits, planes)
    estimates = np.empty((len(queries), len(rows)), np.float32)
    coded.estimate(codes, np.ones(len(codes), np.float32), estimates)
    peaks = coded.peaks[:, None].astype(np.float64)
    return (estimates - queries / peaks @ values.T) / (coded.slack[:, None] * np.linalg.norm(values, axis=1))


@pytest.mark.parametrize("constants", [PAIRS, NO_PAIRS], ids=["pairs", "no-pairs"])
@pytest.mark.parametrize("num_queries", [1, 2, 33])
@pytest.mark.parametrize(("bits", "planes"), DEPTHS)
def test_estimates_are_off_by_no_more_than_their_slack(
    bits: int, planes: int, num_queries: int, constants: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, **constants)
    rng = np.random.default_rng(bits)
    queries = rng.standard_normal((num_queries, 256)).astype(np.float32) * 10.0 ** rng.uniform(-8, 8, (num_queries, 1))
    off = errors(queries.astype(np.float32), rng.standard_normal((COUNT, 256)), bits, planes)
    assert np.abs(off).max() <= 1
    if bits < 32:  # of those the slack is what sums may lose
        assert np.abs(off).max() > 0.02, "a slack that is much too wide"


@pytest.mark.parametrize("constants", [{}, NO_PAIRS], ids=["pairs", "no-pairs"])
@pytest.mark.parametrize(("bits", "planes"), DEPTHS)
def test_estimates_of_rows_like_the_query_are_not_too_low(
    bits: int, planes: int, constants: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What coding takes from a query is orthogonal to it; else the scores of its nearest rows would miss a share."""
    force(monkeypatch, **constants)
    query = np.random.default_rng(0).standard_normal(8192).astype(np.float32)
    for cosine in LIKE:
        off = errors(query[None], rows_like(query, cosine, 100), bits, planes)
        assert off.min() >= -1, f"at cosine {cosine}"
        assert off.mean() >= -0.1, f"at cosine {cosine} estimates are {-off.mean():.2f} slacks too low on average"


@pytest.mark.parametrize("bits", BITS)
def test_a_query_of_zeros_is_estimated_to_be_zero(bits: int) -> None:
    queries = np.zeros((2, 64), np.float32)
    coded, codes = code_queries(queries, bits), encode(torch.randn(5, 64), bits).codes
    estimates = np.empty((2, 5), np.float32)
    coded.estimate(codes, np.ones(len(codes), np.float32), estimates)
    assert not estimates.any()
    assert not coded.slack.any()


@pytest.mark.parametrize("count", [1, 4, 8, 24])
def test_bit_planes_are_those_of_a_loop(count: int) -> None:
    cells = np.random.default_rng(count).integers(1 << count, size=(3, 64)).astype(np.int32)
    planes = np.unpackbits(bit_planes(cells, count), axis=2, bitorder="little")
    for place in range(count):
        np.testing.assert_array_equal(planes[:, place], [[cell >> place & 1 for cell in row] for row in cells.tolist()])
