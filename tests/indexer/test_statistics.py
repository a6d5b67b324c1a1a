"""Standard errors hold: truths lie within two of them as often as they should, over many draws of the hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutting import CONFIG, COUNT
from looped import MODELS, LoopedTask, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import (
    Estimate,
    ExampleSketcher,
    Index,
    SketchConfig,
    StepSketcher,
    delete_examples,
    open_index,
    step_energies,
)
from loopsway.indexer.curation import energy
from loopsway.indexer.sketches.coding import decode, encode, standard_errors
from loopsway.indexer.sketches.rotation import rotate, rotate_back

from .conftest import build

WIDTH, SEEDS = 512, 60
BITS = (1, 2, 32)


def test_truths_lie_within_two_standard_errors_as_often_as_they_should() -> None:
    """In 93 to 97 % of all pairs of an example and a query's step, for three models, against untied copies."""
    shares: dict[int, list[float]] = {bits: [] for bits in BITS}
    for kind in MODELS:
        model = make_model(kind).double()
        examples, asked = make_examples(16, seed=1), make_examples(4, seed=77)
        exact = torch.einsum(
            "np,qtp->qnt",
            step_gradients(model, kind.loop, examples).sum(1),
            step_gradients(model, kind.loop, asked),
        ).numpy()
        for seed in range(SEEDS):
            sketcher = StepSketcher(model, kind.loop, SketchConfig(width=WIDTH, seed=seed))
            totals, queries = (rotate(sketcher.sketch(losses, collate(each)), seed) for each in (examples, asked))
            norms = queries.norm(dim=2).numpy()  # [Q, T]
            for bits in BITS:
                codes = encode(totals.sum(1), bits)
                found = np.einsum("nw,qtw->qnt", decode(codes.codes, codes.factors, bits), queries.numpy())
                errors = standard_errors(found, codes.norms[None, :, None], norms[:, None], width=WIDTH, bits=bits)
                live = errors > 0  # a step without gradient has none
                shares[bits].append(float((np.abs(found - exact) <= 2 * errors)[live].mean()))
    for bits, share in shares.items():
        mean = np.mean(share)
        assert 0.93 <= mean <= 0.97, (
            f"{mean:.1%} lie within two errors with {bits} bits: they are too {'small' if mean < 0.93 else 'large'}"
        )


def test_significant_influences_are_those_beyond_two_standard_errors(whole_index: Path) -> None:
    index = open_index(whole_index)
    task = LoopedTask(count=COUNT)
    queries = ExampleSketcher(task, CONFIG).sketch(task.examples()[:1]).values.numpy()
    ranked = index.search(queries[0], COUNT).total.proponents
    assert 0 < ranked.significant.sum() < len(ranked.rows)
    for influence, error, significant in zip(
        ranked.influences, ranked.standard_errors, ranked.significant, strict=True
    ):
        assert significant == (influence > 2 * error)


def planted(path: Path, bits: int) -> tuple[Index, np.ndarray]:
    """A small index, and its decoded totals [N, W], to make queries of known influences with."""
    index = build(path, config=SketchConfig(width=1024, bits=bits))
    return index, index.sketches(np.arange(index.num_rows))[:, -1]


def test_raw_energies_and_signed_sums_are_those_of_every_score(tmp_path: Path) -> None:
    index, _ = planted(tmp_path / "of.index", 1)
    delete_examples(index.path, ids=["train/7"])
    index = open_index(index.path)
    queries = np.random.default_rng(0).standard_normal((3, index.num_steps, index.width)).astype(np.float32)
    for resolve in ("query_step", "train_step", "same_step"):
        for where in (None, "length > 3"):
            found = step_energies(index, queries, resolve, where=where)
            scores = index.scores(queries, resolve, where=where).influences[:, 1:].astype(np.float64)
            np.testing.assert_allclose(found.raw_energies, np.abs(scores).sum(2), rtol=1e-4)
            scale = np.abs(scores).sum(2).max()
            np.testing.assert_allclose(found.signed_sums.values, scores.sum(2), atol=1e-5 * scale)
            np.testing.assert_allclose(found.shares.values.sum(1), 1, rtol=1e-6)
            over = found.energies.values.sum(1, keepdims=True)
            np.testing.assert_allclose(found.signed_shares.values, found.signed_sums.values / over, rtol=1e-6)
    one = step_energies(index, queries[1])
    np.testing.assert_allclose(one.energies.values, step_energies(index, queries).energies.values[1:2], rtol=1e-5)


@pytest.mark.parametrize("together", [energy.TOGETHER, 5])
def test_energies_estimate_the_exact_ones_within_their_errors(
    tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 rows in the place of gradients: queries of known influences plus noise across every row."""
    monkeypatch.setattr(energy, "TOGETHER", together)
    rng, width, count, steps = np.random.default_rng(2), 4096, 50, 4
    inside: dict[str, list[np.ndarray]] = {"energies": [], "signed_sums": [], "shares": [], "signed_shares": []}
    index = build(tmp_path / "of.index", config=SketchConfig(width=width, bits=1))
    for _ in range(20):
        # W Gaussian pairs stand for a sketch of two gradients of that covariance.
        gradients = rng.standard_normal((count, 8)) * np.exp(rng.standard_normal((count, 1)))
        queries = rng.standard_normal((3, steps, 8))
        exact = np.einsum("nd,qtd->qnt", gradients, queries)
        directions = rng.standard_normal((8, width)) / np.sqrt(width)
        noisy = StoredRows(index, (gradients @ directions).astype(np.float32))
        found = step_energies(noisy, rotated_back(queries @ directions, index))  # pyright: ignore[reportArgumentType]
        true_energies, true_sums = np.abs(exact).sum(1), exact.sum(1)
        over = true_energies.sum(1, keepdims=True)
        truths = {"energies": true_energies, "signed_sums": true_sums, "shares": true_energies / over,
                  "signed_shares": true_sums / over}  # fmt: skip
        for name, truth in truths.items():
            estimate: Estimate = getattr(found, name)
            inside[name].append(np.abs(estimate.values - truth) <= 2 * estimate.standard_errors)
        assert (found.raw_energies > 0.9 * true_energies).all()
    for name, each in inside.items():
        share = np.mean(each)
        assert 0.85 < share <= 0.99, f"{share:.1%} of {name} lie within two standard errors, expected about 95 %"


def test_noise_by_itself_has_no_energy(tmp_path: Path) -> None:
    index, _ = planted(tmp_path / "of.index", 1)
    rows = np.random.default_rng(3).standard_normal((index.num_rows, index.width)).astype(np.float32)
    queries = np.random.default_rng(4).standard_normal((20, index.num_steps, index.width)).astype(np.float32)
    found = step_energies(StoredRows(index, rows), queries)  # pyright: ignore[reportArgumentType]
    assert (found.energies.values.mean() / found.raw_energies.mean()) < 0.05
    assert (np.abs(found.energies.values) < 2 * found.energies.standard_errors).mean() > 0.9


def test_zero_queries_have_no_energy_and_no_shares(whole_index: Path) -> None:
    index = open_index(whole_index)
    found = step_energies(index, np.zeros((index.num_steps, index.width), np.float32))
    for estimate in (found.energies, found.signed_sums, found.shares, found.signed_shares):
        assert (estimate.values == 0).all()
        assert (estimate.standard_errors == 0).all()


class StoredRows:
    """An index whose rows, rotated, are these: what `step_energies` asks of an index."""

    def __init__(self, index: Index, rows: np.ndarray) -> None:
        self._index, self._rows = index, rows
        self.codes = self  # the reader of its rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def decoded(self, step: int | None, rows: np.ndarray) -> np.ndarray:
        return self._rows[rows]


def rotated_back(vectors: np.ndarray, index: Index) -> np.ndarray:
    """Sketches whose rotation gives these vectors."""
    return rotate_back(torch.from_numpy(vectors.astype(np.float32)), index.config.seed).numpy()
