"""Approximate search finds what the build measured that it finds, by any FAISS factory, or the index is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from looped import LoopedTask, make_examples
from loopsway.indexer import (
    Approximation,
    ExampleSketcher,
    Index,
    IndexDamagedError,
    IndexExistsError,
    RecallError,
    SketchConfig,
    add_examples,
    build_index,
    compact_index,
    delete_examples,
    open_index,
    verify_index,
)
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.building.recall import _held_out, measured
from loopsway.indexer.search.filters import matching_rows
from loopsway.indexer.search.shards import EXTRA_CANDIDATES, MOST_CANDIDATES
from loopsway.indexer.search.slot import open_slots
from loopsway.indexer.sketches.coding import code_examples
from loopsway.indexer.store.entries import CodedExamples
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.generation import Generation
from loopsway.indexer.store.manifest import Manifest
from loopsway.indexer.store.row_table import ROWS, write_row_table

COUNT, WIDTH, K = 400, 256, 10
HOPELESS = "IVF1,PQ1x1"  # two values a row
FACTORIES = {
    "IVF16,SQ8": "IndexIVFScalarQuantizer",
    "HNSW16,SQ8": "IndexHNSWSQ",
    "IVF4,PQ32x4fs,Refine(SQ8)": "IndexRefine",
    "RR256,IVF4,SQfp16": "IndexPreTransform",
    "IVF4,RaBitQ": "IndexIVFRaBitQ",
    "SQ8": "IndexScalarQuantizer",
}


def build(path: Path, bits: int = 1, **arguments: Any) -> Index:
    task = arguments.pop("task", None) or LoopedTask(count=COUNT)
    config = SketchConfig(width=WIDTH, bits=bits)
    return build_index(task, path, config, block_rows=64, progress=False, **arguments)


def queries(count: int = 12, num_steps: int | None = None) -> np.ndarray:
    """Sketches of examples that are in no index here, [count, S, W]."""
    task = LoopedTask(count=1)
    sketches = ExampleSketcher(task, SketchConfig(width=WIDTH)).sketch(make_examples(count, seed=99)).values.numpy()
    return sketches[:, :num_steps]


@pytest.fixture(scope="module", params=[(name, bits) for name in FACTORIES for bits in (1, 16)], ids=str)
def approximate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    factory, bits = request.param
    path = tmp_path_factory.mktemp("recall") / "a.index"
    return build(path, bits, faiss=factory, recall_queries=queries())


def kind(index: Any) -> str:
    return type(faiss.downcast_index(index)).__name__


def best(scores: np.ndarray, sign: int, rows: np.ndarray, left_out: int) -> list[int]:
    """The K strongest of a sign among these rows."""
    order = sorted(rows, key=lambda row: -sign * scores[row])
    return [row for row in order if sign * scores[row] > 0 and row != left_out][:K]


def found_share(answers: Sequence[set[int]], truths: Sequence[set[int]]) -> float:
    wanted = sum(map(len, truths))
    return sum(len(mine & truth) for mine, truth in zip(answers, truths, strict=True)) / wanted if wanted else 1.0


def sides(index: Index, sketches: np.ndarray, **arguments: Any) -> list[Any]:
    """All that searches answer, of both signs."""
    return [
        side
        for resolve in ("query_step", "train_step", "same_step")
        for ranking in index.search(sketches, k=K, resolve=resolve, **arguments)
        for at in (ranking.total, *ranking.steps)
        for side in (at.proponents, at.opponents)
    ]


def test_the_files_are_of_the_factory(approximate: Index) -> None:
    factory = approximate.approximation.factory
    files = sorted(Path(approximate.path).rglob("*.faiss"))
    assert len(files) == approximate.num_steps + 1
    for file in files:
        loaded: Any = faiss.read_index(str(file))
        assert (kind(loaded), loaded.ntotal) == (FACTORIES[str(factory)], COUNT)
    assert verify_index(approximate.path, progress=False) == []


def test_every_slot_meets_the_floor_of_both_signs_on_both_kinds_of_queries(approximate: Index) -> None:
    recall, floor = approximate.recall, approximate.approximation.recall_floor
    names = {"total", *map(str, range(approximate.num_steps))}
    assert set(recall["by_slot"]) == set(recall["efforts"]) == set(recall["held_out"]) == set(recall["given"]) == names
    for name in names:
        each = [share for kind in ("held_out", "given") for share in recall[kind][name].values()]
        assert min(each) == recall["by_slot"][name] >= floor
        assert recall["efforts"][name] in (1, 2, 4, 8, 16, 32)
    assert recall["recall@10"] == pytest.approx(np.mean(list(recall["by_slot"].values())))
    assert (recall["factory"], recall["recall_floor"]) == (approximate.approximation.factory, floor)


def test_recall_is_that_of_brute_force(approximate: Index) -> None:
    """Of the total, at the least effort: everything decoded, multiplied and sorted, one query after another."""
    index = approximate
    part = index.manifest.parts[0]
    slot = open_slots(Generation(index.folder / part.folder, part.plan), part.own_files)[None]
    rows = np.concatenate(list(slot.blocks())).astype(np.float64)
    asked = _held_out(slot)
    assert len(asked.queries) == 32
    np.testing.assert_array_equal(asked.queries[:16], slot.rows(asked.left_out[:16]))
    recalls = measured(slot, Approximation(recall_floor=0), None, index.num_steps).recalls["held_out"]
    found = slot.search(asked.queries, K + 1, effort=1)
    for sign, share in ((1, recalls.proponents), (-1, recalls.opponents)):
        hits = wanted = 0
        for query, own, (mine, _) in zip(asked.queries, asked.left_out, found, strict=True):
            scores = sign * (rows @ query)
            limit = np.sort([score for row, score in enumerate(scores) if score > 0 and row != own])[-K:]
            hits += sum(scores[row] >= limit[0] * (1 - 1e-5) for row in best(sign * scores, sign, mine, own))
            wanted += len(limit)
        assert share == pytest.approx(hits / wanted, abs=1e-9)


def test_an_answer_says_its_recall_and_its_scores_are_exact(approximate: Index) -> None:
    index, sketches = approximate, queries(6)
    by_slot = index.recall["by_slot"]
    assert {each.recall for each in index.search(sketches, k=K, exact=False)} == {by_slot["total"]}
    every = index.search(sketches, k=K, resolve="train_step", exact=False)
    assert {each.recall for each in every} == {min(by_slot.values())}
    assert index.search(sketches[0], resolve="same_step", steps=[2], exact=False).recall == min(
        by_slot["2"], by_slot["total"]
    )
    assert index.search(sketches[0]).recall == 1
    for query in sketches:
        side = index.search(query, k=K, exact=False).total.proponents
        influences = index.trajectories(query, side.example_ids).sum(2)[0]
        np.testing.assert_allclose(side.influences, influences, rtol=1e-3, atol=1e-5 * np.abs(influences).max())


def test_given_queries_are_found_as_well_as_was_measured(approximate: Index) -> None:
    """Through the index's own door, exact against approximate."""
    index, sketches = approximate, queries()
    pairs = zip(sides(index, sketches, exact=False), sides(index, sketches), strict=True)
    answers, truths = zip(*((set(mine.rows), set(exact.rows)) for mine, exact in pairs), strict=True)
    assert found_share(answers, truths) >= index.approximation.recall_floor


@pytest.mark.parametrize(
    ("every", "where"),
    [
        (3, None),
        (20, None),  # a graph is walked only where nearly all rows are kept
        (20, "length > 2"),
        (3, "length < 4"),
        (3, "label == 1 and length == 5"),
        (3, "length > 100"),
    ],
)
def test_deleted_rows_and_filtered_ones_are_in_no_answer(
    approximate: Index, tmp_path: Path, every: int, where: str | None
) -> None:
    path = shutil.copytree(approximate.path, tmp_path / "copy.index")
    gone = np.arange(0, COUNT, every)
    delete_examples(path, ids=[f"train/{row}" for row in gone])
    index = open_index(path)
    matching = np.ones(COUNT, bool) if where is None else matching_rows(index.examples, where)
    may = np.setdiff1d(np.flatnonzero(matching), gone)
    answers = [set(side.rows) for side in sides(index, queries(), where=where, exact=False)]
    assert set.union(*answers) <= set(may)
    truths = [set(side.rows) for side in sides(index, queries(), where=where)]
    share = found_share(answers, truths)
    assert share == 1 if len(may) < COUNT / 4 else share > 0.95


def test_a_filter_takes_nothing_from_what_cells_and_graphs_find(tmp_path: Path) -> None:
    """More cells are visited for it, in all as many rows; a graph is left for a scan."""
    task, sketches = LoopedTask(count=1500), queries(24)
    for factory in ("IVF32,SQ8", "HNSW4,SQ8"):
        index = build(tmp_path / f"{factory}.index", 8, task=task, faiss=factory, recall_floor=0.7)
        assert max(index.recall["by_slot"].values()) < 0.97, "nothing is to be seen where all is found"
        for where in ("label == 1", "length < 4", "length < 4 and label == 1"):
            answers, truths = (
                [set(side.rows) for side in sides(index, sketches, where=where, exact=exact)] for exact in (False, True)
            )
            assert found_share(answers, truths) > min(index.recall["by_slot"].values()) - 0.03


def test_a_querys_size_does_not_matter(approximate: Index) -> None:
    sketch = queries(1)[0]
    rows = [side.rows.tolist() for side in sides(approximate, sketch[None], exact=False)]
    for size in (2.0**-40, 2.0**40):  # that change no rounding
        resized = sketch[None] * np.float32(size)
        assert [side.rows.tolist() for side in sides(approximate, resized, exact=False)] == rows
    assert not any(len(side.rows) for side in sides(approximate, np.zeros_like(sketch[None]), exact=False))


@pytest.mark.parametrize("factory", [None, "IVF1,RaBitQ", "IVF1,RaBitQ4", "SQfp16"])
@pytest.mark.parametrize("spread", [0, 1])
def test_a_first_try_finds_the_best_of_thousands(tmp_path: Path, factory: str | None, spread: float) -> None:
    """So few of so many are candidates that scores must be right, whatever sizes rows and queries have."""
    plan, count, width = build(tmp_path / "a.index").manifest.plan, 4096, 1024
    config = SketchConfig(width=width, bits=1)
    plan = replace(plan, num_examples=count, num_steps=1, config=config, block_rows=count, shard_rows=count)
    generation = Generation(LocalFolder(tmp_path / "noise"), plan)
    generation.create()
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 1, width, generator=draw) * (spread * torch.randn(count, 1, 1, generator=draw)).exp()
    rows += 0.5 * torch.randn(width, generator=draw) * rows.norm(dim=2, keepdim=True) / width**0.5  # what they share
    steps, total = code_examples(rows, seed=0, bits=1)
    losses = np.zeros((len(plan.checkpoints), count), np.float32)
    generation.write(0, CodedExamples(steps=steps, total=total, losses=losses, steps_without_gradient=()))
    table = {ROWS: write_row_table(generation)}
    slot = open_slots(generation, table, factory=factory)[None]
    slot.build()
    for size in (1e-6, 1, 1e6):
        asked = (torch.randn(8, width, generator=draw) * size).numpy()
        answers, truths = (
            [{*rows[:K].tolist(), *rows[-K:].tolist()} for rows, _ in slot.search(asked, K, effort=effort)]
            for effort in (1, None)
        )
        assert found_share(answers, truths) > 0.98


def test_effort_is_raised_until_the_floor_is_met(tmp_path: Path) -> None:
    low = build(tmp_path / "low.index", faiss="IVF16,SQ8", recall_floor=0)
    assert set(low.recall["efforts"].values()) == {1}
    assert max(low.recall["by_slot"].values()) < 0.9, "one cell of sixteen should not be enough"
    high = build(tmp_path / "high.index", faiss="IVF16,SQ8")
    assert min(high.recall["efforts"].values()) > 1
    assert min(high.recall["by_slot"].values()) >= 0.99
    middle = build(tmp_path / "middle.index", faiss="IVF16,SQ8", recall_floor=0.7)
    for slot, effort in middle.recall["efforts"].items():
        assert low.recall["efforts"][slot] < effort <= high.recall["efforts"][slot]


def test_more_effort_finds_no_less(approximate: Index) -> None:
    part = approximate.manifest.parts[0]
    slot = open_slots(Generation(approximate.folder / part.folder, part.plan), part.own_files)[None]
    asked = np.random.default_rng(0).standard_normal((20, WIDTH)).astype(np.float32)
    truths = [set(rows[:K]) | set(rows[-K:]) for rows, _ in slot.search(asked, K)]
    full = slot.full_effort(K)
    shares, effort = [], 1
    while effort <= full:
        found = slot.search(asked, K, effort=effort)
        assert max(len(rows) for rows, _ in found) <= 2 * max(K + EXTRA_CANDIDATES, COUNT * MOST_CANDIDATES)
        shares.append(found_share([set(rows[:K]) | set(rows[-K:]) for rows, _ in found], truths))
        effort *= 2
    assert shares == sorted(shares)


class Counted(LoopedTask):
    """Counts the batches that are sketched."""

    batches = 0

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        self.batches += 1
        return super().losses(model, batch)


def test_an_index_that_finds_too_little_is_refused_and_its_sketches_are_kept(tmp_path: Path) -> None:
    path, first, second = tmp_path / "a.index", Counted(count=COUNT), Counted(count=COUNT)
    text = (
        r"FAISS factory 'IVF1,PQ1x1' finds 0\.\d+ of the 10 strongest \w+ of step 0, on held-out queries at full "
        r"effort \(4\); the recall floor is 0\.99.*are kept: run the same command with .*--faiss 'SQ8'.*--recall-floor"
    )
    with pytest.raises(RecallError, match=text) as caught:
        build(path, task=first, faiss=HOPELESS)
    assert isinstance(caught.value, ValueError)
    assert not (path / "manifest.json").exists()
    entries = {file: file.read_bytes() for file in path.glob("generations/*/blocks/*.json")}
    assert len(entries) == 7
    index = build(path, task=second, faiss="SQ8")
    assert index.approximation == Approximation(factory="SQ8")
    assert entries == {file: file.read_bytes() for file in path.glob("generations/*/blocks/*.json")}
    build(path, task=(opened := Counted(count=COUNT)))
    assert second.batches == opened.batches < first.batches / 4, "as many as opening it takes: a probe"
    assert verify_index(path, progress=False) == []


def test_a_lower_floor_lets_it_pass(tmp_path: Path) -> None:
    index = build(tmp_path / "a.index", faiss=HOPELESS, recall_floor=0.1)
    assert 0.1 <= index.search(queries(1)[0], exact=False).recall < 0.9
    assert index.search(queries(1)[0]).recall == 1


def test_the_floor_holds_for_given_queries_too(tmp_path: Path) -> None:
    """Two cells are enough for held-out queries, and not for noise."""
    noise = np.random.default_rng(0).standard_normal((20, 3, WIDTH)).astype(np.float32)
    index = build(tmp_path / "a.index", faiss="IVF16,SQ8", recall_floor=0.65, recall_queries=noise)
    alone = build(tmp_path / "b.index", faiss="IVF16,SQ8", recall_floor=0.65)
    assert alone.recall["given"] == {}
    efforts, before = index.recall["efforts"], alone.recall["efforts"]
    assert all(efforts[slot] >= before[slot] for slot in efforts)
    assert efforts != before
    assert min(share for each in index.recall["given"].values() for share in each.values()) >= 0.65


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"faiss": "nonsense"}, r"width 256 by factory 'nonsense' \(.*\); such as 'IVF256,SQ8', .* work"),
        ({"faiss": ""}, "by factory ''"),
        ({"faiss": "SQ8,IVF16"}, "by factory 'SQ8,IVF16'"),
        (
            {"faiss": "PQ16"},
            r"'PQ16' makes an IndexPQ, which can't pass over deleted rows .*'IVF1,' before a 'PQ\.\.\.'",
        ),
        ({"faiss": "PQ16x4fs,Refine(SQ8)"}, "makes an IndexPQFastScan, which"),
        ({"faiss": "NSG16,Flat"}, "makes an IndexNSGFlat, which"),
        ({"faiss": "HNSW16,PQ16"}, "makes an IndexHNSWPQ, which .* does not search by inner product"),
        ({"faiss": "IDMap,SQ8"}, "makes an IndexIDMap, which"),
        ({"faiss": "IVF500,SQ8"}, r"'IVF500,SQ8' needs 500 rows to be trained, and an index of a step here has 400"),
        ({"faiss": "IVF4,PQ16x9"}, "needs 512 rows"),
        ({"recall_floor": 1.5}, "recall_floor is 1.5, expected a share from 0 to 1"),
        ({"recall_floor": float("nan")}, "recall_floor is nan"),
        ({"recall_queries": np.zeros((3, 4, 128))}, r"shape \(3, 4, 128\), expected \[steps, 256\]"),
        ({"recall_queries": np.full((3, 4, 256), np.inf)}, "not finite"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_is_sketched(tmp_path: Path, arguments: Any, text: str) -> None:
    task = Counted(count=COUNT)
    with pytest.raises(ValueError, match=f"(?s){text}"):
        build(tmp_path / "a.index", task=task, **arguments)
    assert task.batches == 0
    assert not list(tmp_path.rglob("plan.json"))


def kinds(index: Index) -> list[set[str]]:
    """Of the FAISS files of each part."""
    folders = [Path(index.path) / part.folder for part in index.manifest.parts]
    read = [[faiss.read_index(str(file)) for file in folder.rglob("*.faiss")] for folder in folders]
    return [set(map(kind, part)) for part in read]


def test_additions_and_compactions_keep_the_factory_and_the_floor(tmp_path: Path) -> None:
    path, task = tmp_path / "a.index", LoopedTask(count=COUNT)
    build(path, task=SubsetTask(task, range(200)), faiss="IVF16,SQ8", recall_floor=0.9)
    arguments: Any = {"block_rows": 64, "progress": False}
    index = add_examples(SubsetTask(task, range(200, 390)), path, **arguments)
    wanted = Approximation(factory="IVF16,SQ8", recall_floor=0.9)
    assert [part.approximation for part in index.manifest.parts] == [wanted] * 2
    assert kinds(index) == [{"IndexIVFScalarQuantizer"}] * 2
    parts = [min(each["by_slot"].values()) for each in index._recalls]
    ranking = index.search(queries(1)[0], resolve="train_step", exact=False)
    assert ranking.recall == min(parts), "of the worst part"
    index = add_examples(SubsetTask(task, range(390, 400)), path, **arguments)
    assert kinds(index)[2] == {"IndexRaBitQ"}, "ten rows are too few for sixteen cells"
    found = [set(side.rows) for side in sides(index, queries(), exact=False)]
    assert found_share(found, [set(side.rows) for side in sides(index, queries())]) > 0.9
    delete_examples(path, ids=["train/7"])
    index = compact_index(path, progress=False)
    assert [part.approximation for part in index.manifest.parts] == [wanted]
    assert kinds(index) == [{"IndexIVFScalarQuantizer"}]
    assert verify_index(path, progress=False) == []


def test_an_addition_that_finds_too_little_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    path, task = tmp_path / "a.index", LoopedTask(count=COUNT)
    build(path, task=SubsetTask(task, range(40)), faiss=HOPELESS)
    assert min(open_index(path).recall["by_slot"].values()) == 1, "all rows of so few are candidates"
    with pytest.raises(RecallError, match="additions and compactions keep those of their index"):
        add_examples(SubsetTask(task, range(40, COUNT)), path, block_rows=64, progress=False)
    assert (open_index(path).num_examples, open_index(path).generation) == (40, 1)
    assert verify_index(path, progress=False) == []


def test_a_finished_index_keeps_its_factory(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    build(path, faiss="IVF4,SQ8")
    assert build(path).approximation.factory == "IVF4,SQ8"
    with pytest.raises(IndexExistsError, match="with FAISS factory 'IVF4,SQ8' and not 'SQ8'; build to another path"):
        build(path, faiss="SQ8")


def test_a_shard_that_is_too_small_takes_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopsway.indexer.search.shards.SHARD_BYTES", 192 * WIDTH // 8)
    index = build(tmp_path / "a.index", faiss="IVF32,SQ8", recall_floor=0.95)
    files = sorted(Path(index.path).rglob("total-*.faiss"))
    loaded: list[Any] = [faiss.read_index(str(file)) for file in files]
    assert [(kind(each), each.ntotal) for each in loaded] == [
        ("IndexIVFScalarQuantizer", 192),
        ("IndexIVFScalarQuantizer", 192),
        ("IndexRaBitQ", 16),
    ]
    found = [set(side.rows) for side in sides(index, queries(), exact=False)]
    assert found_share(found, [set(side.rows) for side in sides(index, queries())]) > 0.9


def test_a_damaged_file_of_a_factory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    build(path, faiss="IVF4,SQ8")
    file = next(path.rglob("step-0001-00.faiss"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [damage.file for damage in verify_index(path, progress=False)] == [str(file)]
    file.write_bytes(data[:-1])
    with pytest.raises(IndexDamagedError, match="bytes, not"):
        open_index(path)


def test_a_manifest_without_an_approximation_has_the_default(tmp_path: Path) -> None:
    build(tmp_path / "a.index")
    part = Manifest.read(open_index(tmp_path / "a.index").folder).parts[0]
    data = part.to_dict()
    del data["approximation"]
    assert type(part).from_dict(data) == part
    assert part.approximation == Approximation(factory=None, recall_floor=0.99)
