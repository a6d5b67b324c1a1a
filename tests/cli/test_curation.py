"""`loopsway score`, `neighbors` and `energy`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from loopsway.indexer import ExampleSketcher, load_task, open_index
from serving import TASK_SPEC

from .conftest import invoke

TASK = ["--task", TASK_SPEC]


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    file = tmp_path / "queries.jsonl"
    file.write_text('{"tokens": [1, 2, 3, 4, 5, 6]}\n{"tokens": [2, 2, 0, 1, 3, 3]}\n{"tokens": [5, 1, 4, 4, 0, 6]}\n')
    return file


def test_a_query_sets_mean_is_scored(tiny_index: Path, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    arguments = ["score", tiny_index, "--queries", queries, *TASK, "--out", out, "--top", "0.1", "--bottom", "0.05"]
    done = invoke(arguments)
    assert done.exit_code == 0, done.stderr
    index = open_index(tiny_index)
    assert done.stdout == (
        f"{out}: {index.num_examples:,} examples by the mean of 3 queries, in scores-00000.parquet\n"
    )
    rows = pyarrow.parquet.read_table(out / "scores-00000.parquet").to_pylist()
    kept = -(-index.num_examples // 10) + -(-index.num_examples // 20)
    assert len(rows) == kept * (index.num_steps + 1)
    again = invoke(arguments)
    assert again.stdout == done.stdout
    other = invoke([*arguments, "--each"])
    assert other.exit_code == 1
    assert (
        other.stderr
        == f"Error: {out} holds the output of another job (scores.json says of what); name an empty folder\n"
    )


def test_each_query_is_scored_from_every_source(tiny_index: Path, queries: Path, tmp_path: Path) -> None:
    index, task = open_index(tiny_index), load_task(TASK_SPEC)
    examples = [task.example_from_json(json.loads(line)) for line in queries.read_text().splitlines()]
    sketcher = ExampleSketcher(task, index.config)
    np.save(tmp_path / "q.npy", sketcher.sketch(examples).values.numpy())
    (tmp_path / "names").write_text("tiny-3\ntiny-5\n")
    sources = {
        "json": (["--queries", queries, *TASK], ["1", "2", "3"]),
        "npy": (["--sketches", tmp_path / "q.npy", "--fingerprint", index.fingerprint], ["0", "1", "2"]),
        "file": (["--ids-file", tmp_path / "names", *TASK], ["tiny-3", "tiny-5"]),
        "ids": (["--ids", "tiny-3,tiny-5", *TASK], ["tiny-3", "tiny-5"]),
    }
    tables = {}
    for name, (source, ids) in sources.items():
        done = invoke(["score", tiny_index, *source, "--each", "--out", tmp_path / name, "--resolve", "train-step"])
        assert done.exit_code == 0, done.stderr
        assert f"each of {len(ids)} queries" in done.stdout
        tables[name] = pyarrow.parquet.read_table(tmp_path / name / "scores-00000.parquet")
        assert tables[name]["query"].unique().to_pylist() == ids
    assert tables["ids"] == tables["file"]
    assert tables["json"]["id"] == tables["npy"]["id"]


def test_self_influence_needs_no_task(tiny_index: Path, tmp_path: Path) -> None:
    done = invoke(["score", tiny_index, "--self", "--out", tmp_path, "--top", "0.25"])
    assert done.exit_code == 0, done.stderr
    assert "by self-influence" in done.stdout
    table = pyarrow.parquet.read_table(tmp_path / "scores-00000.parquet")
    assert min(table["influence"].to_pylist()) >= 0


def test_what_to_score_by_must_be_named_once(tiny_index: Path, queries: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "none"]
    cases = [
        ([], 2, "name the queries by one of --queries FILE.jsonl, --ids, --ids-file and --sketches FILE.npy"),
        (["--queries", queries, "--ids", "a", *TASK], 2, "name the queries by one of"),
        (["--sketches", queries], 2, "--sketches and --fingerprint go together"),
        (["--sketches", queries, "--fingerprint", "00"], 2, "the sketches are of fingerprint 00"),
        (["--self", "--each"], 2, "--self takes no queries, --each or --where"),
        (["--queries", queries], 1, "its code only runs when you name it, with --task"),
        (["--ids", "none", *TASK], 1, "example 'none' is not among the"),
        (["--queries", queries, *TASK, "--where", "lenght > 2"], 1, "no column 'lenght'"),
        (["--queries", queries, *TASK, "--top", "2"], 2, "2.0 is not in the range"),
    ]
    for arguments, code, message in cases:
        done = invoke(["score", tiny_index, *arguments, *out])
        assert (done.exit_code, message in done.stderr.replace("\n", " ")) == (code, True), done.stderr
    assert not (tmp_path / "none").exists()


def test_neighbors_of_an_example_are_listed(tiny_index: Path) -> None:
    done = invoke(["neighbors", tiny_index, "--id", "tiny-3", "--id", "tiny-5", "--k", "4", "--json"])
    assert done.exit_code == 0, done.stderr
    documents = json.loads(done.stdout)
    assert [each["id"] for each in documents] == ["tiny-3", "tiny-5"]
    for document in documents:
        similarities = [each["similarity"] for each in document["neighbors"]]
        assert (len(similarities), similarities) == (4, sorted(similarities, reverse=True))
        assert document["id"] not in {each["id"] for each in document["neighbors"]}
    shown = invoke(
        ["neighbors", tiny_index, "--id", "tiny-3", "--by", "inner-product", "--step", "1", "--threshold", "0"]
    )
    assert shown.exit_code == 0, shown.stderr
    assert "like tiny-3" in shown.stdout
    assert "inner-product" in shown.stdout


def test_near_duplicates_are_written(tiny_index: Path, tmp_path: Path) -> None:
    done = invoke(["neighbors", tiny_index, "--all", "--threshold", "0.5", "--out", tmp_path / "pairs"])
    assert done.exit_code == 0, done.stderr
    table = pyarrow.parquet.read_table(tmp_path / "pairs" / "duplicates-00000.parquet")
    assert done.stdout == f"{tmp_path / 'pairs'}: {len(table):,} pairs of cosine 0.5 and above, in 1 files\n"
    assert len(table) > 0
    for arguments, message in (
        (["--all"], "ask about --id ID"),
        (["--id", "tiny-3", "--all", "--out", tmp_path], "ask about --id ID"),
        (["--id", "tiny-3", "--out", tmp_path], "ask about --id ID"),
        (["--all", "--out", tmp_path / "x", "--k", "3"], "--all takes --threshold, --step and --out"),
    ):
        refused = invoke(["neighbors", tiny_index, *arguments])
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr


def test_energies_are_shown_and_given_as_json(tiny_index: Path, queries: Path) -> None:
    arguments = ["energy", tiny_index, "--queries", queries, *TASK]
    done = invoke([*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [query["id"] for query in document["queries"]] == ["1", "2", "3"]
    for query in document["queries"]:
        assert sum(query["shares"]["values"]) == pytest.approx(1)
        assert (
            len(query["raw_energies"]) == len(query["energies"]["standard_errors"]) == open_index(tiny_index).num_steps
        )
    shown = invoke(arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "middle half" in shown.stdout
    one = invoke(["energy", tiny_index, "--ids", "tiny-3", *TASK, "--resolve", "same-step", "--where", "row < 20"])
    assert one.exit_code == 0, one.stderr
    assert "±" in one.stdout
