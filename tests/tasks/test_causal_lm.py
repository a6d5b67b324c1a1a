"""The causal language model task: what its losses count, what its data and queries hold, and which loops it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from causal_lms import ROWS, VOCABULARY, write_model, write_rows
from loopsway.indexer.config import Loop
from loopsway.indexer.task import TaskError, load_task
from loopsway.tasks.causal_lm import CausalLMTask
from loopsway.tasks.causal_lm_passages import Passage
from loopsway.tasks.causal_lm_tokens import Encoder, Tokens

LOOPS = {"llama": "model.layers.0-2", "gpt2": "transformer.h.0-1", "dory": "model.layers.1-2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in LOOPS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def task(models: dict[str, Path], data: Path) -> CausalLMTask:
    return new_task(models["llama"], data)


@pytest.fixture(scope="module")
def model(task: CausalLMTask) -> torch.nn.Module:
    return task.model(task.checkpoints()[0])


def new_task(folder: Path, data: Path | None = None, loop: str | None = "model.layers.0-2", **others: Any) -> Any:
    return CausalLMTask(str(folder), None if data is None else str(data), loop, **others)


def token_losses(model: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    """The slow oracle: the loss of each token but the first, of one text alone."""
    tokens = torch.tensor([ids])
    return functional.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none")


# Losses.


@pytest.mark.parametrize("kind", LOOPS)
def test_losses_of_a_padded_batch_are_those_of_each_example_alone(
    models: dict[str, Path], data: Path, kind: str
) -> None:
    task = new_task(models[kind], data, LOOPS[kind], dtype="float64")
    model, examples = task.model(task.checkpoints()[0]), task.examples()
    assert len({len(tokens.ids) for tokens in examples}) > 2
    together = task.losses(model, task.collate(examples))
    alone = torch.cat([task.losses(model, task.collate([tokens])) for tokens in examples])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert not model.training


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_counts_the_completion_alone_or_all_tokens(
    models: dict[str, Path], data: Path, model: torch.nn.Module, reduction: str
) -> None:
    for answer_only in (True, False):
        task = new_task(models["llama"], data, answer_only=answer_only, reduction=reduction)
        losses = task.losses(model, task.collate(task.examples()))
        for row, tokens in zip(ROWS, task.examples(), strict=True):
            first = tokens.counted.start
            assert first == 1 if not answer_only or "text" in row else first > 1
            expected = getattr(token_losses(model, tokens.ids)[first - 1 :], reduction)()
            torch.testing.assert_close(losses[task.examples().index(tokens)], expected)


def test_counted_tokens_are_exactly_those_of_the_completion(models: dict[str, Path], data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(models["llama"], local_files_only=True)
    task = new_task(models["llama"], data)
    for row, tokens in zip(ROWS, task.examples(), strict=True):
        counted = tokenizer.decode(tokens.ids[tokens.counted.start :])
        assert counted == row.get("completion", " dog barked")  # of plain text, all but the first token


def test_special_tokens_at_the_ends_and_a_token_across_the_border_leave_the_completion_whole() -> None:
    begin, end = 1, 2
    texts = {"ab": [begin, 10, 11, end], "abcd": [begin, 10, 12, 13, end]}  # "b" and "c" are one token, 12
    encoder = Encoder(lambda asked: [texts[text] for text in asked], max_length=9, vocabulary=20)
    [tokens] = encoder.encode([Passage(prompt="ab", completion="cd")], answer_only=True)
    assert tokens.counted == range(2, 5)


def test_a_position_counts_that_token_alone(task: CausalLMTask, model: torch.nn.Module) -> None:
    row = {"prompt": "two and two", "completion": " are four"}
    every = token_losses(model, task.example_from_json(row).ids)
    for position in range(1, len(every) + 1):
        query = task.example_from_json({**row, "position": position})
        [loss] = task.losses(model, task.collate([query]))
        torch.testing.assert_close(loss, every[position - 1])


def test_a_query_is_the_example_of_the_same_text(task: CausalLMTask) -> None:
    for row, tokens in zip(ROWS, task.examples(), strict=True):
        asked = {name: row[name] for name in ("prompt", "completion", "text") if name in row}
        assert task.example_from_json(asked) == tokens
    everything = task.example_from_json({"prompt": "a cat", "completion": " sat on the mat", "answer_only": False})
    assert everything.counted == range(1, len(everything.ids))


def test_bytes_are_the_tokens_of_a_model_without_a_tokenizer(tmp_path: Path, data: Path) -> None:
    folder = write_model(tmp_path / "bytes", tokenizer=False)
    with pytest.raises(TaskError, match=r"no tokenizer's files are in .* or 'bytes'"):
        new_task(folder, data).examples()
    task = new_task(folder, data, tokenizer="bytes")
    tokens = task.examples()[4]
    assert bytes(tokens.ids).decode() == "ünï čode — ✓"
    assert tokens.counted == range(len("ünï".encode()), len(tokens.ids))
    assert task.losses(task.model(task.checkpoints()[0]), task.collate(task.examples())).shape == (6,)


# Data.


def test_a_row_tells_its_own_columns_its_tokens_and_one_line(task: CausalLMTask) -> None:
    count = [len(tokens.ids) for tokens in task.examples()]
    assert task.metadata(0) == {"source": "sums", "score": 1.0, "num_tokens": count[0], "is_cut": False}
    assert task.metadata(2) == {"source": None, "score": 2.0, "num_tokens": count[2], "is_cut": False}
    assert task.describe(0) == "two and two -> are four"
    assert task.describe(2) == "the dog barked"
    assert task.example_id(3) == "3"


def test_columns_of_other_names_are_read(models: dict[str, Path], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "gsm.jsonl", [{"question": "How many?\nSay.", "answer": "4", "id": True}])
    columns = {"prompt_column": "question", "completion_column": "answer", "separator": "\n"}
    task = new_task(models["llama"], file, **columns)
    assert task.describe(0) == "How many? Say. -> 4"
    assert set(task.metadata(0)) == {"id", "num_tokens", "is_cut"}
    assert task.example_from_json({"prompt": "How many?\nSay.", "completion": "4"}) == task.examples()[0]


def test_what_is_cut_at_max_length_is_told(models: dict[str, Path], data: Path) -> None:
    whole = new_task(models["llama"], data)
    task = new_task(models["llama"], data, max_length=6, answer_only=False)  # one prompt alone has more
    tokens, full = task.examples()[1], whole.examples()[1]
    assert tokens.ids == full.ids[:6]
    assert task.metadata(1)["is_cut"]
    assert task.describe(1) == f"a cat -> sat on the mat [first 6 of {len(full.ids)} tokens]"
    with pytest.raises(ValueError, match=rf"the text has {len(full.ids)} tokens; at most 6 are read"):
        task.example_from_json({"prompt": "a cat", "completion": " sat on the mat"})


def test_a_prompt_that_leaves_no_room_for_its_completion_is_named(models: dict[str, Path], data: Path) -> None:
    with pytest.raises(TaskError, match=r"1 examples of .* have no token whose loss counts .* \(examples 3, counted"):
        new_task(models["llama"], data, max_length=5).examples()


def test_max_length_is_what_the_model_reads(models: dict[str, Path], data: Path) -> None:
    assert new_task(models["gpt2"], data, LOOPS["gpt2"])._encoder.max_length == 64
    with pytest.raises(TaskError, match="max_length is 65; this model reads 2 to 64 tokens"):
        new_task(models["gpt2"], data, LOOPS["gpt2"], max_length=65).examples()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*rows.jsonl is no example: .* A line is"),
        ("[1]", "line 2 of .*: it is no object but list"),
        ('{"prompt": "a"}', r"line 2 of .*: it has neither 'prompt' and 'completion' nor 'text', but \['prompt'\]"),
        ('{"prompt": "a", "completion": 4}', "line 2 of .*: 'completion' must be text; got int 4"),
        (r'{"text": "\ud800"}', "line 2 of .*: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_example_is_named(models: dict[str, Path], tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        new_task(models["llama"], file).examples()


def test_missing_or_empty_data_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no examples were named; give data="):
        new_task(models["llama"]).examples()
    with pytest.raises(TaskError, match=r"the examples in .*none.jsonl can't be read"):
        new_task(models["llama"], tmp_path / "none.jsonl").examples()
    with pytest.raises(TaskError, match="holds no examples"):
        new_task(models["llama"], write_rows(tmp_path / "empty.jsonl", [])).examples()


# Queries.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["text", "prompt"]), inner),
)
KEYS = ("prompt", "completion", "text", "answer_only", "position")


@given(obj=JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON | st.text() | st.integers(-2, 9))))
def test_json_is_an_example_or_a_value_error(task: CausalLMTask, obj: Any) -> None:
    try:
        tokens = task.example_from_json(obj)
    except ValueError as error:
        assert type(error) in (ValueError, TaskError)  # noqa: PT017
        return
    assert isinstance(tokens, Tokens)
    assert tokens.counted
    assert 0 < tokens.counted.start < tokens.counted.stop <= len(tokens.ids) <= 64
    assert set(obj) <= set(KEYS)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ("a cat", 'an example is an object, {"prompt": .*; got str'),
        ({}, "one of the two; got the keys \\[\\]"),
        ({"prompt": "a"}, "one of the two; got the keys"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "one of the two"),
        ({"text": "a", "label": 1}, "may not have the keys .*label"),
        ({"text": 5}, "'text' must be text; got int 5"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"text": "a"}, "the text has 1 tokens and none to predict"),
        ({"prompt": "a cat", "completion": ""}, "none to predict"),
        ({"text": "a cat sat", "answer_only": True}, '"answer_only" needs a "prompt" and a "completion"'),
        ({"text": "a cat sat", "answer_only": 1}, '"answer_only" must be true or false; got int'),
        ({"text": "a cat sat", "position": True}, '"position" must be a whole number.*; got bool'),
        ({"text": "a cat sat", "position": 0}, r'"position" is 0, but the text has \d+ tokens: expected 1 to'),
        ({"text": "a cat sat", "position": 99}, r'"position" is 99, but'),
        ({"prompt": "a", "completion": "b", "answer_only": True, "position": 1}, '"position" names the one token'),
        ({"text": "no " * 100}, r"the text has \d+ tokens; at most 64 are read"),
        ({"text": "x" * 10**6}, "the text has 1000000 characters; at most 64 tokens are read"),
    ],
)
def test_refused_json_is_told_what_was_wrong(task: CausalLMTask, obj: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.example_from_json(obj)


# Loops.


@pytest.mark.parametrize(
    ("text", "body", "marker"),
    [
        ("model.layers.1-2", ["model.layers.1", "model.layers.2"], "model.layers.1"),
        ("model.layers.0-1, model.norm", ["model.layers.0", "model.layers.1", "model.norm"], "model.layers.0"),
        ("model.layers.1-2.mlp", ["model.layers.1.mlp", "model.layers.2.mlp"], "model.layers.1.mlp"),
        ("model.layers.2", ["model.layers.2"], None),
        ("model.layers.*", ["model.layers.*"], None),
    ],
)
def test_a_range_is_its_layers_and_the_first_begins_a_step(
    models: dict[str, Path], text: str, body: list[str], marker: str | None
) -> None:
    assert new_task(models["llama"], loop=text).loop == Loop(body=body, marker=marker)
    assert new_task(models["llama"], loop=text, marker="model.norm").loop == Loop(body=body, marker="model.norm")
    assert new_task(models["llama"], loop=text, outside=True).loop == Loop(body=body, marker=marker, outside=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layers.1-3", r"range 'model.layers.1-3': model.layers has 3 layers, model.layers.0 to model.layers.2"),
        ("model.layers.2-1", "has 3 layers"),
        ("layers.0-1", r"no list of layers 'layers'. The model's lists of layers are model.layers \(3 x LlamaDecoder"),
        (None, r"no loop was named: .* loop='model.layers.0-2' .* are model.layers \(3 x LlamaDecoderLayer\)"),
        (" , ", "no loop was named"),
    ],
)  # fmt: skip
def test_a_wrong_loop_is_told_what_the_model_has(models: dict[str, Path], text: str | None, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        new_task(models["llama"], loop=text)


# Construction.


def test_it_is_a_task_that_an_index_can_name(models: dict[str, Path], data: Path) -> None:
    arguments = {"model": str(models["llama"]), "data": str(data), "loop": "model.layers.0-2", "max_length": 32}
    task = load_task("loopsway.tasks.causal_lm:CausalLMTask", json.loads(json.dumps(arguments)))
    assert len(task.examples()) == len(ROWS)
    model = task.model(task.checkpoints()[0])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max', expected one of mean, sum"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32"),
        ({"attention": "flash"}, "attention is 'flash', expected one of sdpa, eager"),
        ({"base": "x"}, "a base model .x. was given, but .* holds no adapter"),
    ],
)
def test_a_wrong_argument_is_named(models: dict[str, Path], option: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        new_task(models["llama"], **option)


def test_a_model_without_sdpa_takes_the_attention_it_has(tmp_path: Path, data: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    task = new_task(tmp_path, data, "model.layers.0-1", tokenizer="bytes")
    model = task.model(task.checkpoints()[0])
    assert task.losses(model, task.collate(task.examples())).isfinite().all()


def test_a_tokenizer_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "small")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        token: number + (VOCABULARY if token == "a" else 0) for token, number in tokenizer["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=rf"the tokenizer gives token \d+, but the model knows {VOCABULARY}"):
        new_task(folder).example_from_json({"text": "a x a"})
