"""Search finds what a reading of the stored codes finds, with honest errors, under every way to resolve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import zarr

from looped import MODELS, LoopedTask, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import ExampleSketcher, Index, SketchConfig, StepSketcher, UnknownExampleError, build_index
from loopsway.indexer.config import BITS
from loopsway.indexer.search.ranking import pairs
from loopsway.indexer.search.shards import LEAST_NORM
from loopsway.indexer.sketches.coding import decode
from loopsway.indexer.sketches.rotation import rotate

WIDTH = 1024
KINDS = [kind.__name__ for kind in MODELS]
RESOLVES = ("query_step", "train_step", "same_step")


def build(
    path: Path, bits: int, kind: str = "InjectedModel", count: int = 150, seed: int = 5
) -> tuple[Index, np.ndarray]:
    """An index, and sketches [3, S, W] of two examples that are in it and one that isn't."""
    task, config = LoopedTask(kind, count), SketchConfig(width=WIDTH, bits=bits, seed=seed)
    index = build_index(task, path / f"{kind}-{bits}-{seed}.index", config, block_rows=64, progress=False)
    queries = [*task.examples()[7:9], make_examples(1, seed=99)[0]]
    return index, ExampleSketcher(task, config).sketch(queries).values.numpy()


@pytest.fixture(
    scope="module",
    params=[(kind, 1) for kind in KINDS] + [(KINDS[0], bits) for bits in BITS[1:]],
    ids=lambda case: f"{case[0]}-{case[1]}bits",
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, np.ndarray]:
    kind, bits = request.param
    return build(tmp_path_factory.mktemp("search"), bits, kind)


@pytest.fixture(scope="module")
def one_bit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, np.ndarray]:
    return build(tmp_path_factory.mktemp("search"), 1)


def read_slots(index: Index) -> dict[int | None, np.ndarray]:
    """Our own reading of the codes with plain zarr: decoded rows by step, the total under None."""
    group: Any = zarr.open_group(next((Path(index.path) / "generations").iterdir()) / "arrays.zarr", mode="r")
    arrays = {name: group[name][...] for name in ("step_codes", "step_factors", "total_codes", "total_factors")}
    slots: dict[int | None, np.ndarray] = {None: decode(arrays["total_codes"], arrays["total_factors"], index.bits)}
    for step in range(index.num_steps):
        slots[step] = decode(arrays["step_codes"][step], arrays["step_factors"][step], index.bits)
    return slots


def rotated(index: Index, queries: np.ndarray) -> np.ndarray:
    """[Q, S + 1, W]: each step and, last, the sum."""
    steps = rotate(torch.from_numpy(queries), index.config.seed).numpy()
    return np.concatenate([steps, steps.sum(1, keepdims=True)], axis=1)


@pytest.mark.parametrize("resolve", RESOLVES)
def test_search_is_the_exact_top_k_of_the_stored_codes(built: tuple[Index, np.ndarray], resolve: Any) -> None:
    index, queries = built
    slots, vectors = read_slots(index), rotated(index, queries)
    rankings = index.search(queries, k=6, resolve=resolve)
    for query, ranking in enumerate(rankings):
        for pair, found in zip(pairs(resolve, index.num_steps, index.num_steps), ranking.steps, strict=True):
            scores = slots[pair.slot] @ vectors[query, pair.query]
            for ranked, sign in ((found.proponents, 1), (found.opponents, -1)):
                best = np.lexsort((np.arange(len(scores)), -sign * scores))[:6]
                best = best[sign * scores[best] > 0]
                np.testing.assert_allclose(ranked.influences, scores[best], rtol=1e-3, atol=1e-5)
                np.testing.assert_allclose(ranked.influences, scores[ranked.rows], rtol=1e-3, atol=1e-5)
                assert ranked.example_ids == tuple(f"train/{row}" for row in ranked.rows)


def test_faiss_scores_equal_our_reading_of_the_codes(one_bit: tuple[Index, np.ndarray]) -> None:
    index, queries = one_bit
    slots, vectors = read_slots(index), rotated(index, queries)[:, -1]
    for slot, name in ((None, "total"), (2, "step-0002")):
        loaded: Any = faiss.read_index(str(next(Path(index.path).rglob(f"{name}-00.faiss"))))
        loaded.qb = 0  # the query unquantized
        scores, rows = loaded.search(vectors, 20)
        norms = index.total_norms() if slot is None else index.step_norms()[slot]
        own = np.take_along_axis(vectors @ slots[slot].T, rows, axis=1) * (LEAST_NORM / norms.min())
        np.testing.assert_allclose(scores, own, rtol=1e-3, atol=1e-4 * np.abs(own).max())


@pytest.mark.parametrize("resolve", ["query_step", "train_step"])
def test_trajectories_sum_to_tracin(built: tuple[Index, np.ndarray], resolve: Any) -> None:
    index, queries = built
    ids = ["train/0", "train/7", "train/149"]
    steps = index.trajectories(queries, ids, resolve)
    total = np.stack([read_slots(index)[None][[0, 7, 149]] @ vector for vector in rotated(index, queries)[:, -1]])
    assert steps.shape == (3, 3, index.num_steps)
    if resolve == "query_step":
        np.testing.assert_allclose(steps.sum(2), total, rtol=1e-4, atol=1e-5 * np.abs(total).max())
    elif index.bits >= 16:  # steps and total are coded apart: equal where coding loses nothing
        np.testing.assert_allclose(steps.sum(2), total, rtol=2e-3, atol=2e-3 * np.abs(total).max())


def test_search_and_trajectories_agree(built: tuple[Index, np.ndarray]) -> None:
    index, queries = built
    for resolve in RESOLVES:
        for query, ranking in enumerate(index.search(queries, k=4, resolve=resolve)):
            for place, found in enumerate(ranking.steps):
                ids = found.proponents.example_ids
                influences = index.trajectories(queries[query], ids, resolve)[0, :, place]
                errors = index.standard_errors(queries[query], ids, resolve)[0, :, place]
                np.testing.assert_allclose(influences, found.proponents.influences, rtol=1e-3, atol=1e-5)
                np.testing.assert_allclose(errors, found.proponents.standard_errors, rtol=1e-3)


def test_the_step_matrix_holds_every_pair(built: tuple[Index, np.ndarray]) -> None:
    index, queries = built
    matrix = index.trajectories(queries, ["train/3", "train/4"], "step_matrix")
    assert matrix.shape == (3, 2, index.num_steps, index.num_steps)
    by_train = index.trajectories(queries, ["train/3", "train/4"], "train_step")
    same = index.trajectories(queries, ["train/3", "train/4"], "same_step")
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(matrix.sum(3), by_train, rtol=1e-3, atol=1e-5 * scale)
    np.testing.assert_allclose(np.einsum("qnss->qns", matrix), same, rtol=1e-3, atol=1e-5 * scale)


def test_a_planted_duplicate_of_the_query_comes_first(built: tuple[Index, np.ndarray]) -> None:
    """The query is the example of largest norm: by Cauchy-Schwarz nothing but itself has a larger influence on it."""
    index, _ = built
    task = LoopedTask(index.name.split("-")[0], count=index.num_examples)
    row = int(index.total_norms().argmax())
    query = ExampleSketcher(task, index.config).sketch([task.examples()[row]]).values[0]
    found = index.search(query, k=3).total.proponents
    first, planted = (sorted(task.examples()[r].tokens) for r in (found.rows[0], row))
    assert first == planted  # the models read a string in any order the same
    assert found.influences[0] == pytest.approx(float(query.sum(0).square().sum()), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_influences_estimate_the_oracles_within_their_standard_errors(tmp_path: Path, kind: str) -> None:
    """Against untied copies in float64, both checkpoints, with 1 bit: about 95 % within two, over a few seeds."""
    task = LoopedTask(kind, 40)
    examples = [*task.examples(), task.examples()[7], task.examples()[8], make_examples(1, seed=99)[0]]
    exact = 0
    for checkpoint in task.checkpoints():
        phi = step_gradients(task.model(checkpoint), task.loop, examples)
        exact = exact + checkpoint.learning_rate * torch.einsum("np,qtp->qnt", phi[:40].sum(1), phi[40:]).numpy()
    ids, ratios = [task.example_id(row) for row in range(40)], []
    for seed in range(5):
        index, queries = build(tmp_path, 1, kind, count=40, seed=seed)
        errors, stated = index.trajectories(queries, ids) - exact, index.standard_errors(queries, ids)
        np.testing.assert_array_equal(errors[stated == 0], 0)
        ratios.append(errors[stated > 0] / stated[stated > 0])
    share = np.mean(np.abs(ratios) <= 2)
    assert 0.9 < share < 0.999, f"{share:.1%} of influences lie within two standard errors, expected about 95 %"


def test_k_beyond_the_index_gives_what_there_is(built: tuple[Index, np.ndarray]) -> None:
    index, queries = built
    ranking = index.search(queries[0], k=10_000)
    found = ranking.total
    rows = np.concatenate([found.proponents.rows, found.opponents.rows])
    assert len(set(rows.tolist())) == len(rows) == index.num_examples
    assert np.all(np.diff(found.proponents.influences) <= 0)
    assert np.all(np.diff(found.opponents.influences) >= 0)


def test_a_query_alone_and_in_a_batch_has_the_same_answer(built: tuple[Index, np.ndarray]) -> None:
    index, queries = built
    together = index.search(queries, k=5)
    for query in range(3):
        alone = index.search(queries[query], k=5)
        for one, other in zip(alone.steps, together[query].steps, strict=True):
            np.testing.assert_allclose(one.proponents.influences, other.proponents.influences, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(one.proponents.rows, other.proponents.rows)


def test_a_subset_of_steps_is_that_part_of_the_whole(one_bit: tuple[Index, np.ndarray]) -> None:
    index, queries = one_bit
    whole, part = index.search(queries[0], k=5), index.search(queries[0], k=5, steps=[3, 1])
    assert [found.step for found in part.steps] == [3, 1]
    for found in part.steps:
        assert found.step is not None
        np.testing.assert_array_equal(found.proponents.rows, whole.steps[found.step].proponents.rows)


def test_a_query_of_zeros_has_neither_proponents_nor_opponents(built: tuple[Index, np.ndarray]) -> None:
    index, queries = built
    ranking = index.search(np.zeros_like(queries[0]))
    assert len(ranking.total.proponents.rows) == len(ranking.total.opponents.rows) == 0


class Unequal(LoopedTask):
    """Gradients over nine orders of magnitude, as after training: most examples are learned, a few are not."""

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(model, batch) * 10.0 ** -(batch["tokens"].sum(1) % 10)


@pytest.mark.parametrize(
    ("bits", "factory"), [(1, None), (8, None), (32, None), (1, "SQfp16"), (16, "RaBitQ"), (1, "IVF4,RaBitQ")]
)
def test_rows_of_very_unequal_norms_are_all_found(tmp_path: Path, bits: int, factory: str | None) -> None:
    task, config = Unequal(count=400), SketchConfig(width=WIDTH, bits=bits)
    index = build_index(task, tmp_path / "unequal.index", config, faiss=factory, progress=False)
    assert index.total_norms().max() / index.total_norms().min() > 1e8
    assert index.recall["recall@10"] > 0.99
    queries = ExampleSketcher(task, config).sketch(task.examples()[:8]).values.numpy()
    total, vectors = read_slots(index)[None], rotated(index, queries)[:, -1]
    for ranking, vector in zip(index.search(queries, k=10), vectors, strict=True):
        best = np.sort(total @ vector)[::-1][:10]
        np.testing.assert_allclose(ranking.total.proponents.influences, best[best > 0], rtol=1e-3)


def test_equal_rows_are_ordered_by_row(tmp_path: Path) -> None:
    task = LoopedTask(count=60)
    task._examples = [task.examples()[0]] * 60
    index = build_index(task, tmp_path / "same.index", SketchConfig(width=WIDTH), progress=False)
    ranking = index.search(ExampleSketcher(task, index.config).sketch(task.examples()[:1]).values[0], k=60)
    assert ranking.total.proponents.rows.tolist() == list(range(60))


def test_one_example_and_one_step_are_enough(tmp_path: Path) -> None:
    class Single(LoopedTask):
        def model(self, checkpoint: Any) -> Any:
            return make_model(self._kind, num_steps=1)

    task = Single(count=1)
    index = build_index(task, tmp_path / "single.index", SketchConfig(width=WIDTH), progress=False)
    ranking = index.search(ExampleSketcher(task, index.config).sketch(task.examples()).values[0], k=3)
    assert ranking.total.proponents.example_ids == ("train/0",)
    assert ranking.steps[0].proponents.influences == pytest.approx(ranking.total.proponents.influences, rel=1e-4)


def test_steps_without_gradient_are_zero_and_named(tmp_path: Path) -> None:
    index, queries = build(tmp_path, 1, "RangeModel")
    assert index.steps_without_gradient == (0,)
    assert not index.step_norms()[0].any()
    assert len(index.search(queries[0]).steps[0].proponents.rows) == 0
    assert len(index.search(queries[0], resolve="train_step").steps[0].proponents.rows) == 0


def test_a_query_may_run_more_steps_than_the_index(one_bit: tuple[Index, np.ndarray]) -> None:
    index, _ = one_bit
    model = make_model(MODELS[0], num_steps=7)
    queries = StepSketcher(model, model.loop, index.config).sketch(losses, collate(make_examples(2))).numpy()
    assert len(index.search(queries[0], k=2).steps) == 7
    assert len(index.search(queries[0], k=2, resolve="train_step").steps) == index.num_steps
    assert index.trajectories(queries, ["train/0"], "step_matrix").shape == (2, 1, index.num_steps, 7)
    with pytest.raises(ValueError, match="index has 4 and the query 7"):
        index.search(queries[0], resolve="same_step")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 0}, "k is 0, expected at least 1"),
        ({"resolve": "nonsense"}, "resolve is 'nonsense', expected one of query_step"),
        ({"steps": [4]}, "step 4 does not exist; expected 0 to 3"),
        ({"steps": [-1]}, "step -1 does not exist"),
    ],
)
def test_a_wrong_argument_is_named(one_bit: tuple[Index, np.ndarray], arguments: Any, text: str) -> None:
    index, queries = one_bit
    with pytest.raises(ValueError, match=text):
        index.search(queries[0], **arguments)


@pytest.mark.parametrize(
    ("sketches", "text"),
    [
        (np.zeros((4, 512)), rf"shape \(4, 512\), expected \[steps, {WIDTH}\]"),
        (np.zeros(WIDTH), r"expected \[steps"),
        (np.zeros((0, WIDTH)), r"expected \[steps"),
        (np.full((4, WIDTH), np.nan), "not finite"),
    ],
)
def test_wrong_sketches_are_refused(one_bit: tuple[Index, np.ndarray], sketches: np.ndarray, text: str) -> None:
    index, _ = one_bit
    with pytest.raises(ValueError, match=text):
        index.search(sketches)
    with pytest.raises(ValueError, match=text):
        index.trajectories(sketches, ["train/0"])


def test_an_unknown_example_is_named(one_bit: tuple[Index, np.ndarray]) -> None:
    index, queries = one_bit
    with pytest.raises(UnknownExampleError, match=r"'train/999' is not among the 150 .* look like 'train/0'"):
        index.trajectories(queries, ["train/0", "train/999"])


@pytest.mark.parametrize("resolve", [*RESOLVES, "step_matrix"])
@pytest.mark.parametrize("steps", [[2], [2, 0], [1, 1, 2], []])
def test_a_trajectory_over_some_steps_is_those_of_the_whole(
    built: tuple[Index, np.ndarray], resolve: Any, steps: list[int]
) -> None:
    index, queries = built
    ids, places = ["train/3", "train/140", "train/3"], list(dict.fromkeys(steps))
    whole = index.trajectories_with_errors(queries, ids, resolve)
    found = index.trajectories_with_errors(queries, ids, resolve, steps)
    for got, every in zip(found, whole, strict=True):
        np.testing.assert_array_equal(got, every[..., places])
        assert got.dtype == np.float32


def test_a_trajectory_reads_the_slots_of_its_steps_alone(
    one_bit: tuple[Index, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, queries = one_bit
    read: list[int | None] = []
    decoded = index.codes.decoded
    monkeypatch.setattr(index.codes, "decoded", lambda slot, rows: (read.append(slot), decoded(slot, rows))[1])
    for resolve in ("train_step", "same_step"):
        index.trajectories(queries, ["train/0"], resolve, steps=[1, 3])
        assert sorted(read) == [1, 3]  # type: ignore[type-var]
        read.clear()


def test_a_step_that_a_trajectory_does_not_have_is_named(one_bit: tuple[Index, np.ndarray]) -> None:
    index, _ = one_bit
    longer = np.ones((7, WIDTH), np.float32)
    assert index.trajectories(longer, ["train/0"], "step_matrix", steps=[6]).shape == (1, 1, index.num_steps, 1)
    for resolve, most in (("query_step", 6), ("train_step", 3), ("step_matrix", 6)):
        with pytest.raises(ValueError, match=f"step 7 does not exist; expected 0 to {most}"):
            index.trajectories(longer, ["train/0"], resolve, steps=[7])  # type: ignore[arg-type]


def test_recall_is_measured(built: tuple[Index, np.ndarray]) -> None:
    index, _ = built
    assert index.recall["recall@10"] >= 0.99
    assert set(index.recall["by_slot"]) == {"total", *map(str, range(index.num_steps))}


def test_a_search_ends_between_slots_when_it_is_told_to(one_bit: tuple[Index, np.ndarray]) -> None:
    index, queries = one_bit
    for read in (index.search, index.scores):
        parts: list[int] = []

        def go_on(parts: list[int] = parts) -> None:
            parts.append(1)
            if len(parts) > 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            read(queries[0], resolve="train_step", go_on=go_on)
        assert len(parts) == 3
