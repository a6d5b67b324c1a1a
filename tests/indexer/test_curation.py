"""Scores, self-influence and neighbours are those of a reading of the codes, or of exact gradients, and can be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from looped import LoopedTask, make_examples, step_gradients
from loopsway.indexer import (
    ExampleQueries,
    ExampleSketcher,
    Index,
    LoadError,
    SketchConfig,
    SketchedQueries,
    StoppedError,
    UnknownExampleError,
    add_examples,
    delete_examples,
    find_duplicates,
    find_neighbors,
    load_sketcher,
    open_index,
    score_examples,
    score_self_influence,
    self_influences,
)
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.config import BITS
from loopsway.indexer.curation import duplicates, scoring
from loopsway.indexer.curation.query_set import QuerySet
from loopsway.indexer.curation.score_table import Fractions
from loopsway.indexer.search.filters import FilterError
from loopsway.indexer.search.similarity import agreements, cosines
from loopsway.indexer.sketches.coding import encode

from .conftest import build

WIDTH, COUNT = 512, 60
RESOLVES: tuple[Any, ...] = ("query_step", "train_step", "same_step")


def task_of(count: int = COUNT) -> LoopedTask:
    return LoopedTask(count=count)


@pytest.fixture(scope="module", params=BITS, ids=lambda bits: f"{bits}bits")
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Two parts, of which an example is deleted."""
    path, config = tmp_path_factory.mktemp("curation") / "of.index", SketchConfig(width=WIDTH, bits=request.param)
    build(path, SubsetTask(task_of(), range(40)), config)
    add_examples(SubsetTask(task_of(), range(40, COUNT)), path, progress=False)
    delete_examples(path, ids=["train/7"])
    return open_index(path)


@pytest.fixture(scope="module")
def sketches() -> np.ndarray:
    """Of five queries, [5, S, W]."""
    config = SketchConfig(width=WIDTH)
    return ExampleSketcher(task_of(), config).sketch(make_examples(5, seed=99)).values.numpy()


def read(folder: Path, names: tuple[str, ...]) -> pa.Table:
    assert sorted(file.name for file in folder.glob("*.parquet")) == sorted(names)
    return pa.concat_tables([pyarrow.parquet.read_table(folder / name) for name in names])


def rankings(table: pa.Table, query: str | None = None) -> dict[int | None, list[dict[str, Any]]]:
    """Rows of one query by step."""
    found: dict[int | None, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        if query is None or row["query"] == query:
            found.setdefault(row["step"], []).append(row)
    return found


@pytest.mark.parametrize("resolve", RESOLVES)
def test_scores_are_what_trajectories_say_of_every_example(index: Index, sketches: np.ndarray, resolve: Any) -> None:
    scores = index.scores(sketches, resolve)
    ids = [index.examples["id"][row].as_py() for row in scores.rows]
    assert (len(ids), "train/7" in ids, scores.steps) == (COUNT - 1, False, (None, 0, 1, 2, 3))
    influences, errors = index.trajectories_with_errors(sketches, ids, resolve)  # [Q, n, S]
    largest = np.abs(influences).max()
    np.testing.assert_allclose(scores.influences[:, 1:], influences.swapaxes(1, 2), rtol=1e-5, atol=1e-7 * largest)
    np.testing.assert_allclose(scores.standard_errors[:, 1:], errors.swapaxes(1, 2), rtol=1e-5)
    for query, ranking in enumerate(index.search(sketches, COUNT, resolve)):
        for place, found in enumerate((ranking.total, *ranking.steps)):
            for side in (found.proponents, found.opponents):
                own = np.searchsorted(scores.rows, side.rows)
                np.testing.assert_array_equal(scores.influences[query, place, own], side.influences)
                np.testing.assert_array_equal(scores.standard_errors[query, place, own], side.standard_errors)


@pytest.mark.parametrize("resolve", RESOLVES)
def test_scores_at_some_steps_are_those_among_all(index: Index, sketches: np.ndarray, resolve: Any) -> None:
    whole, some = index.scores(sketches, resolve), index.scores(sketches, resolve, [3, 1])
    assert some.steps == (None, 3, 1)
    for name in ("influences", "standard_errors"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[:, [0, 4, 2]])
    with pytest.raises(ValueError, match="step 4 does not exist; expected 0 to 3"):
        index.scores(sketches, resolve, [4])


def test_a_file_of_scores_ranks_every_example(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    table = read(tmp_path, score_examples(index, sketches, tmp_path, per="each", progress=False))
    assert len(table) == 5 * 5 * (COUNT - 1)
    scores = index.scores(sketches)
    for query in range(5):
        for place, (step, rows) in enumerate(rankings(table, str(query)).items()):
            assert step == scores.steps[place]
            assert [row["rank"] for row in rows] == list(range(1, COUNT))
            influences = [row["influence"] for row in rows]
            assert influences == sorted(influences, reverse=True)
            by_id = dict(zip((row["id"] for row in rows), influences, strict=True))
            own = {
                f"train/{row}": score for row, score in zip(scores.rows, scores.influences[query, place], strict=True)
            }
            assert by_id == own
            for row in rows:
                assert row["significant"] == (abs(row["influence"]) > 2 * row["standard_error"])


def test_the_influence_on_a_mean_is_the_mean_influence(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    mean = read(tmp_path / "mean", score_examples(index.path, sketches, tmp_path / "mean", progress=False))
    each = index.scores(sketches).influences.astype(np.float64).mean(0)
    rows = index.sketched_rows()
    for place, ranking in enumerate(rankings(mean).values()):
        found = {row["id"]: row["influence"] for row in ranking}
        expected = [found[f"train/{row}"] for row in rows]
        np.testing.assert_allclose(expected, each[place], rtol=1e-4, atol=1e-5 * np.abs(each[place]).max())


def test_shares_and_filters_keep_a_part_of_each_ranking(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    whole = rankings(read(tmp_path / "all", score_examples(index, sketches, tmp_path / "all", progress=False)))
    part = rankings(
        read(
            tmp_path / "part", score_examples(index, sketches, tmp_path / "part", top=0.05, bottom=0.1, progress=False)
        )
    )
    for step, ranking in whole.items():
        assert part[step] == [*ranking[:3], *ranking[-6:]], "2.95 and 5.9 of 59, rounded up"
    where = rankings(
        read(tmp_path / "w", score_examples(index, sketches, tmp_path / "w", where="length > 3", progress=False))
    )
    long = {row for row in range(COUNT) if task_of().metadata(row)["length"] > 3}
    for step, ranking in whole.items():
        kept = [row for row in ranking if int(row["id"].removeprefix("train/")) in long]
        assert [(row["id"], row["influence"]) for row in where[step]] == [(row["id"], row["influence"]) for row in kept]
        assert [row["rank"] for row in where[step]] == list(range(1, len(kept) + 1))


class Counting(QuerySet):
    """Queries that note when they are sketched, and stop at the n-th call."""

    def __init__(self, sketches: np.ndarray, stop_at: int | None = None) -> None:
        self.ids, self.digest, self.asked = [f"q{i}" for i in range(len(sketches))], "d", list[range]()
        self._sketches, self._stop_at = sketches, stop_at

    def sketches(self, queries: range) -> np.ndarray:
        if len(self.asked) == self._stop_at:
            raise KeyboardInterrupt
        self.asked.append(queries)
        return self._sketches[queries.start : queries.stop]


@pytest.mark.parametrize("per", ["mean", "each"])
def test_a_cut_job_goes_on_and_ends_as_an_uncut_one(
    index: Index, sketches: np.ndarray, tmp_path: Path, per: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MOST_TOGETHER", 2)
    monkeypatch.setattr(scoring, "SCORES_BYTES", 2 * 8 * 5 * index.num_rows)
    whole, cut, rest = Counting(sketches), Counting(sketches, stop_at=2), Counting(sketches)
    names = score_examples(index, whole, tmp_path / "whole", per=per, progress=False)
    assert whole.asked == [range(0, 2), range(2, 4), range(4, 5)]
    with pytest.raises(KeyboardInterrupt):
        score_examples(index, cut, tmp_path / "cut", per=per, progress=False)
    assert score_examples(index, rest, tmp_path / "cut", per=per, progress=False) == names
    assert rest.asked == [range(4, 5)], "nothing is sketched twice"
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }
    done = Counting(sketches)
    assert score_examples(index, done, tmp_path / "cut", per=per, progress=False) == names
    assert done.asked == []


def test_another_jobs_folder_is_refused(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    score_examples(index, sketches, tmp_path, progress=False)
    others: tuple[dict[str, Any], ...] = (
        {"resolve": "train_step"},
        {"per": "each"},
        {"top": 0.5},
        {"where": "length > 3"},
    )
    for other in others:
        with pytest.raises(FileExistsError, match=r"holds the output of another job \(scores.json says"):
            score_examples(index, sketches, tmp_path, progress=False, **other)
    with pytest.raises(FileExistsError, match="another job"):
        score_examples(index, sketches[:3], tmp_path, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something else, notes.txt for one"):
        score_examples(index, sketches, tmp_path / "mine", progress=False)


def test_what_cannot_be_scored_is_told_before_anything_is_written(
    index: Index, sketches: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"per": "all"}, "per is 'all', expected one of mean, each"),
        ({"top": 0.0}, "top is 0.0, expected a share of the examples, above 0 and at most 1"),
        ({"bottom": 1.5}, "bottom is 1.5"),
        ({"resolve": "steps"}, "resolve is 'steps', expected one of"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            score_examples(index, sketches, out, **arguments)
    with pytest.raises(FilterError, match="no column 'lenght'"):
        score_examples(index, sketches, out, where="lenght > 3")
    with pytest.raises(ValueError, match=rf"expected \[steps, {WIDTH}\]"):
        score_examples(index, sketches[:, :, :64], out)
    assert not out.exists()


def test_queries_of_two_numbers_of_steps_have_no_mean(
    index: Index, sketches: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixed(Counting):
        def sketches(self, queries: range) -> np.ndarray:
            return super().sketches(queries)[:, : 4 if queries.start < 2 else 3]

    monkeypatch.setattr(scoring, "MOST_TOGETHER", 2)
    with pytest.raises(ValueError, match="queries before q2 ran 4 steps, those from there on 3"):
        score_examples(index, Mixed(sketches), tmp_path, progress=False)


def test_sketches_are_read_from_a_file(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "queries.npy", sketches)
    from_file = SketchedQueries(tmp_path / "queries.npy", WIDTH)
    assert (len(from_file), from_file.digest) == (5, SketchedQueries(sketches, WIDTH).digest)
    np.testing.assert_array_equal(from_file.sketches(range(1, 3)), sketches[1:3])
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        SketchedQueries(tmp_path / "text.npy", WIDTH)
    sketches = sketches.copy()
    sketches[4, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        SketchedQueries(sketches, WIDTH).sketches(range(3, 5))


def test_examples_are_queries_as_json_and_by_id(index: Index, tmp_path: Path) -> None:
    task = task_of()
    sketcher = ExampleSketcher(task, index.config)
    file = tmp_path / "queries.jsonl"
    file.write_text('{"tokens": [1, 2, 3]}\n\n{"tokens": [4, 5]}\n')
    queries = ExampleQueries.from_jsonl(file, task, sketcher)
    assert list(queries.ids) == ["1", "3"], "numbers of lines"
    examples = [task.example_from_json({"tokens": tokens}) for tokens in ([1, 2, 3], [4, 5])]
    np.testing.assert_array_equal(queries.sketches(range(2)), sketcher.sketch(examples).values.numpy())
    by_id = ExampleQueries.from_ids(["train/3", "train/50"], index, task, sketcher)
    np.testing.assert_array_equal(by_id.sketches(range(1, 2)), sketcher.sketch([task.examples()[50]]).values.numpy())
    with pytest.raises(UnknownExampleError, match="'train/7' was deleted"):
        ExampleQueries.from_ids(["train/7"], index, task, sketcher)
    with pytest.raises(UnknownExampleError, match="not among the task's examples"):
        ExampleQueries.from_ids(["train/50"], index, task_of(50), sketcher)
    for content, message in (
        ("{", "line 1"),
        ('{"tokens": [1]}\n{"tokens": [9]}', "line 2: tokens are"),
        ("\n", "no queries"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            ExampleQueries.from_jsonl(file, task, sketcher)


def test_a_query_without_a_finite_gradient_is_named(index: Index) -> None:
    task = task_of()
    sketcher = ExampleSketcher(task, index.config)
    sketcher.sketch(task.examples()[:2])
    for each in sketcher._sketchers:
        head: Any = each._capture.model.head
        head.weight.data[:] = torch.inf
    queries = ExampleQueries(sketcher, task.examples(), ["first", "second"], "")
    with pytest.raises(ValueError, match=r"query first, second has no sketch: .*; leave it out"):
        queries.sketches(range(2))


def test_an_index_without_a_named_task_asks_for_one(index: Index) -> None:
    with pytest.raises(LoadError, match="names no task: give --task"):
        load_sketcher(index)


def test_self_influence_is_the_squared_norm(index: Index, tmp_path: Path) -> None:
    task, rows = task_of(), index.sketched_rows()
    values = ExampleSketcher(task, index.config).sketch([task.examples()[row] for row in rows]).values.double()
    scores = self_influences(index)
    np.testing.assert_allclose(scores.influences[0, 0], values.sum(1).square().sum(1), rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(scores.influences[0, 1:], values.square().sum(2).T, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(scores.standard_errors, scores.influences * np.sqrt(2 / WIDTH), rtol=1e-5)
    table = read(tmp_path, score_self_influence(index, tmp_path, top=0.1))
    best = rankings(table)[None]
    assert [row["id"] for row in best] == [f"train/{row}" for row in rows[np.argsort(-scores.influences[0, 0])[:6]]]
    assert score_self_influence(index, tmp_path, top=0.1) == ("scores-00000.parquet",)
    with pytest.raises(FileExistsError, match="another job"):
        score_self_influence(index, tmp_path)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.3, 0.7, 0.95, 0.999])
def test_cosines_are_estimated_within_their_standard_errors(bits: int, rho: float) -> None:
    rng, width = np.random.default_rng(1), 8192
    x, noise = rng.standard_normal((2, 400, width))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    codes, others = (encode(torch.from_numpy(each.astype(np.float32)), bits).codes for each in (x, y))
    found, errors = cosines(np.diagonal(agreements(codes, others, bits)), bits, width)
    ratios = (found - rho) / errors
    assert abs(ratios.mean()) < 0.5, f"biased by {ratios.mean():.2f} errors"
    share = (np.abs(ratios) < 2).mean()
    assert 0.92 < share < 0.99, f"{share:.1%} lie within two standard errors, expected about 95 %"


def test_neighbors_are_those_of_the_exact_gradients(index: Index) -> None:
    task = task_of()
    gradients = torch.cat(
        [
            checkpoint.learning_rate**0.5
            * step_gradients(task.model(checkpoint), task.loop, task.examples()).flatten(2)
            for checkpoint in task.checkpoints()
        ],
        dim=2,
    ).sum(1)
    unit = torch.nn.functional.normalize(gradients, dim=1)
    exact, norms = (unit @ unit.T).numpy(), gradients.norm(dim=1).numpy()
    live = norms > 1e-3 * norms.max()  # the loss of others is so small that float32 gives half of their gradient
    assert live[[3, 50]].all()
    for row, found in zip((3, 50), find_neighbors(index, ["train/3", "train/50"], COUNT), strict=True):
        assert len(found.example_ids) == COUNT - 2, "neither itself nor the deleted one"
        assert found.example_ids == tuple(f"train/{each}" for each in found.rows)
        assert (np.diff(found.similarities) <= 0).all()
        ratios = (found.similarities - exact[row, found.rows]) / np.maximum(found.standard_errors, 1e-3)
        ratios = ratios[live[found.rows]]
        assert np.abs(ratios).max() < 6
        assert (np.abs(ratios) < 2).mean() > 0.85
        (products,) = find_neighbors(index, [f"train/{row}"], COUNT, by="inner_product")
        own = np.argsort(products.rows), np.argsort(found.rows)
        norms = index.total_norms()
        expected = (found.similarities * norms[row] * norms[found.rows])[own[1]]
        np.testing.assert_allclose(products.similarities[own[0]], expected, rtol=1e-5, atol=1e-6 * expected.max())


def test_a_comparison_goes_on_block_by_block_as_long_as_it_may(index: Index) -> None:
    calls: list[int] = []

    def go_on() -> None:
        calls.append(len(calls))
        if len(calls) > most:
            raise TimeoutError("long enough")

    most = len(index.blocks())
    assert find_neighbors(index, ["train/3", "train/50"], 3, go_on=go_on)
    assert len(calls) == most > 1
    most = len(calls) + 1
    with pytest.raises(TimeoutError, match="long enough"):
        find_neighbors(index, ["train/3", "train/50"], 3, go_on=go_on)


def test_neighbors_keep_to_k_threshold_step_and_filter(index: Index) -> None:
    (all_of,) = find_neighbors(index, ["train/3"], COUNT, step=2)
    (three,) = find_neighbors(index, ["train/3"], 3, step=2)
    assert three.example_ids == all_of.example_ids[:3]
    limit = float(all_of.similarities[10])
    (near,) = find_neighbors(index, ["train/3"], None, step=2, threshold=limit)
    assert near.example_ids == all_of.example_ids[: int((all_of.similarities >= limit).sum())]
    (long,) = find_neighbors(index, ["train/3"], COUNT, step=2, where="length > 3")
    kept = [each for each in all_of.example_ids if task_of().metadata(int(each.removeprefix("train/")))["length"] > 3]
    assert list(long.example_ids) == kept
    assert find_neighbors(index, []) == []
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"k": 0}, "k is 0"),
        ({"k": None}, "k and threshold are both None"),
        ({"by": "angle"}, "by is 'angle', expected one of cosine, inner_product"),
        ({"step": 4}, "step 4 does not exist; expected 0 to 3"),
    )
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            find_neighbors(index, ["train/3"], **arguments)
    with pytest.raises(UnknownExampleError, match="'train/7' was deleted"):
        find_neighbors(index, ["train/7"])


def test_duplicates_are_all_pairs_above_the_threshold(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "TOGETHER", 8)
    monkeypatch.setattr(duplicates, "SHARD_ROWS", 24)
    count, names = find_duplicates(index, tmp_path, threshold=0.6, progress=False)
    table = read(tmp_path, names).to_pylist()
    assert (len(names), len(table)) == (3, count)
    expected = {}
    for row in index.sketched_rows():
        (near,) = find_neighbors(index, [f"train/{row}"], None, threshold=0.6)
        for other, cosine in zip(near.rows, near.similarities, strict=True):
            if other > row:
                expected[f"train/{row}", f"train/{other}"] = cosine
    assert {(row["id"], row["other_id"]) for row in table} == expected.keys()
    for row in table:
        assert row["cosine"] == pytest.approx(expected[row["id"], row["other_id"]], abs=1e-5)
    (tmp_path / names[1]).unlink()
    assert find_duplicates(index, tmp_path, threshold=0.6, progress=False) == (count, names)
    with pytest.raises(FileExistsError, match="another job"):
        find_duplicates(index, tmp_path, threshold=0.7, progress=False)
    with pytest.raises(ValueError, match="threshold is 0, expected a cosine above 0"):
        find_duplicates(index, tmp_path / "other", threshold=0)


def test_an_example_that_is_there_twice_is_its_own_duplicate(tmp_path: Path) -> None:
    class Twice(LoopedTask):
        def __init__(self) -> None:
            super().__init__(count=20)
            self._examples[15] = self._examples[4]

    index = build(tmp_path / "twice.index", Twice(), SketchConfig(width=WIDTH, bits=1), batch_size=1)
    _, names = find_duplicates(index, tmp_path / "out", threshold=0.999, progress=False)
    found = {(row["id"], row["other_id"]): row["cosine"] for row in read(tmp_path / "out", names).to_pylist()}
    assert found["train/4", "train/15"] == 1


def test_a_signal_stops_a_job_where_nothing_is_lost(index: Index, sketches: np.ndarray, tmp_path: Path) -> None:
    import os
    import signal

    class Signalled(Counting):
        def sketches(self, queries: range) -> np.ndarray:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().sketches(queries)

    with pytest.raises(StoppedError, match="run the same command to go on"):
        score_examples(index, Signalled(sketches), tmp_path, progress=False)
    assert json.loads((tmp_path / "scores.json").read_text())["queries"] == 5
    rest = Counting(sketches)
    score_examples(index, rest, tmp_path, progress=False)
    assert rest.asked == []


@pytest.mark.parametrize("top", [None, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("bottom", [None, 0.02, 0.5, 1.0])
def test_shares_are_those_of_a_full_stable_sort(top: float | None, bottom: float | None) -> None:
    for values in (np.random.default_rng(0).integers(5, size=203).astype(np.float32), np.zeros(7, np.float32)):
        fractions = Fractions(top=top, bottom=bottom)
        ranks = fractions.ranks(len(values))
        np.testing.assert_array_equal(fractions.places(values), np.argsort(-values, kind="stable")[ranks])
