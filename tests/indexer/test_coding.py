"""Coding loses little, in a known way, and nothing at all along the row itself."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopsway.indexer.config import BITS
from loopsway.indexer.sketches.coding import Codes, code_shape, decode, encode, row_bytes, variance_factor
from loopsway.indexer.sketches.rotation import by_matrices, in_loops, rotate, rotate_back

WIDTH = 256
TRIALS = 200


@pytest.mark.parametrize("width", [64, 128, 256, 8192, 1 << 15])
def test_rotation_keeps_inner_products_and_is_the_same_for_each_row(width: int) -> None:
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    rotated = rotate(rows, 3)
    torch.testing.assert_close(rotated @ rotated.T, rows @ rows.T, rtol=1e-4, atol=1e-2)
    assert torch.equal(rotated[2:3], rotate(rows[2:3], 3)), "whatever it is rotated with"
    assert not torch.allclose(rotated, rotate(rows, 4))


@pytest.mark.parametrize("width", [64, 128, 1024])
def test_the_compiled_transform_is_the_product_with_hadamards_matrix(width: int) -> None:
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(scipy.linalg.hadamard(width)).double()
    expected = (rows.double() @ matrix).float()
    for transformed in (in_loops(rows.clone()), by_matrices(rows)):
        torch.testing.assert_close(transformed, expected, rtol=1e-5, atol=1e-5 * width**0.5)


def test_what_is_rotated_stays_as_it_is() -> None:
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    given = rows.clone()
    rotate_back(rotate(rows, 1), 1)
    rotate_back(rows, 1)
    assert torch.equal(rows, given)


def test_rotation_spreads_a_single_coordinate() -> None:
    row = torch.zeros(1, 4096)
    row[0, 17] = 64.0
    torch.testing.assert_close(rotate(row, 0, rotations=1).abs(), torch.ones(1, 4096))
    rotated = rotate(row, 0)
    assert rotated.square().mean() == pytest.approx(1, rel=1e-4)
    assert rotated.abs().max() < 6, "the second rotation makes it Gaussian"


@pytest.mark.parametrize("rotations", [1, 2, 3])
def test_rotating_back_gives_the_sketch(rotations: int) -> None:
    sketches = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    rotated = rotate(sketches, 5, rotations)
    torch.testing.assert_close(rotate_back(rotated, 5, rotations), sketches, rtol=1e-4, atol=1e-5)


def test_sign_bits_of_a_handful_of_entries_are_unbiased() -> None:
    """One entry is most of the row: after a single rotation the signs are its own, and the others are lost."""
    row = torch.zeros(1, 1024)
    row[0, :4] = torch.tensor([10.0, 2.0, 2.0, 1.0])
    query = torch.zeros(1, 1024)
    query[0, 1:4] = 1.0
    errors = {}
    for rotations in (1, 2):
        found = []
        for seed in range(TRIALS):
            codes = encode(rotate(row, seed, rotations), 1)
            own = decode(codes.codes, codes.factors, 1)
            found.append(float((own @ rotate(query, seed, rotations).numpy().T)[0, 0]))
        errors[rotations] = (np.mean(found) - 5) / (np.std(found) / np.sqrt(TRIALS) + 1e-9)
    assert abs(errors[2]) < 4, f"biased by {errors[2]:.1f} errors of the mean"
    assert abs(errors[1]) > 4, "one rotation would do: is the second needed?"


@pytest.mark.parametrize("bits", BITS)
def test_an_estimate_is_exact_along_the_row_itself(bits: int) -> None:
    rows = rotate(torch.randn(20, WIDTH), 0)
    codes = encode(rows, bits)
    decoded = torch.from_numpy(decode(codes.codes, codes.factors, bits))
    torch.testing.assert_close((decoded * rows).sum(1), rows.square().sum(1), rtol=1e-4, atol=0)
    np.testing.assert_allclose(codes.norms, rows.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_codes_have_the_promised_size(bits: int) -> None:
    codes = encode(torch.randn(3, WIDTH), bits).codes
    assert (codes.shape[1], codes.dtype) == code_shape(WIDTH, bits)
    assert codes[0].nbytes == row_bytes(WIDTH, bits) == WIDTH * bits // 8


@pytest.mark.parametrize("bits", BITS)
def test_estimates_are_unbiased_over_rotations_and_no_noisier_than_stated(bits: int) -> None:
    """The error left by coding is (factor - 1) (|x|^2 |q|^2 - <x, q>^2) / W in variance."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(30, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator) ** 3
    queries = rows[:6] + 0.5 * rows[6:12]  # neither orthogonal nor parallel
    exact = (queries @ rows.T).numpy()
    estimates = []
    for seed in range(TRIALS):
        codes = encode(rotate(rows, seed), bits)
        estimates.append(rotate(queries, seed).numpy() @ decode(codes.codes, codes.factors, bits).T)
    errors = np.stack(estimates) - exact
    if bits <= 8:
        z = errors.mean(0) / (errors.std(0, ddof=1) / np.sqrt(TRIALS))
        assert np.sqrt(np.mean(z**2)) < 1.3, f"rms z is {np.sqrt(np.mean(z**2)):.2f}, expected about 1: biased"
    stated = (queries.square().sum(1)[:, None] * rows.square().sum(1)).numpy() - exact**2
    stated *= (variance_factor(bits) - 1) / WIDTH
    floor = 1e-6 * np.mean(exact**2)  # rounding of float16 and float32
    assert np.mean(errors**2) < 1.1 * np.mean(stated) + floor
    if bits == 1:
        assert np.mean(errors**2) > 0.8 * np.mean(stated), "less noise than one bit can have: coded twice?"


def test_more_bits_are_never_worse() -> None:
    factors = [variance_factor(bits) for bits in BITS]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == pytest.approx(np.pi / 2)
    assert factors[-1] == 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15, 1e30])
def test_neither_tiny_nor_huge_rows_are_lost(bits: int, scale: float) -> None:
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    scaled = encode(rows * scale, bits)
    plain = encode(rows, bits)
    np.testing.assert_allclose(scaled.norms, plain.norms * scale, rtol=1e-4)
    np.testing.assert_allclose(scaled.factors, plain.factors * scale, rtol=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_row_is_zero(bits: int) -> None:
    codes = encode(torch.zeros(2, WIDTH), bits)
    assert not codes.factors.any()
    assert not codes.norms.any()
    assert not decode(codes.codes, codes.factors, bits).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_beyond_float32_are_refused_by_number(value: float) -> None:
    rows = torch.ones(3, WIDTH)
    rows[1] = value
    with pytest.raises(ValueError, match=r"rows \[1\] are not finite, or too large"):
        encode(rows, 1)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_packing_is_undone_by_decoding(seed: int, bits: int, count: int) -> None:
    rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    codes = encode(rows, bits)
    decoded = decode(codes.codes, np.ones_like(codes.factors), bits)
    assert set(np.unique(decoded)) <= set(range(1 - (1 << bits), 1 << bits, 2))
    again = encode(torch.from_numpy(decoded), bits)
    if bits == 1:
        np.testing.assert_array_equal(codes.codes, again.codes)
    assert np.all(np.sign(decoded) == np.where(rows.numpy() < 0, -1, 1))


def test_joined_codes_are_the_rows_in_order() -> None:
    rows = torch.randn(5, WIDTH)
    whole, parts = encode(rows, 1), [encode(rows[:2], 1), encode(rows[2:], 1)]
    joined = Codes.joined(parts)
    np.testing.assert_array_equal(joined.codes, whole.codes)
    np.testing.assert_array_equal(joined.factors, whole.factors)
    np.testing.assert_array_equal(joined.norms, whole.norms)
