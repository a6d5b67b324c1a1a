"""Any causal language model of Hugging Face transformers, with the texts it was trained on, as a Task.

Models, their checkpoints and tokenizers are local folders; examples are lines of a JSONL file. How these are read is in
the files `causal_lm_*`. Legend: B examples, T tokens, V tokens that the model knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loopsway.indexer.config import Checkpoint
from loopsway.indexer.task import Task, TaskError

from .causal_lm_checkpoints import find_checkpoints, find_folders, folder_of, is_adapter, run_folders
from .causal_lm_loops import read_loop
from .causal_lm_models import (
    ADAPTER_PREFIX,
    ATTENTIONS,
    DTYPES,
    attention_of,
    base_folder,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)
from .causal_lm_moments import OPTIMIZER, read_second_moments
from .causal_lm_passages import Columns, Rows, read_query
from .causal_lm_tokens import NOT_COUNTED, Encoder, Tokens, padded

MAX_LENGTH = 512
REDUCTIONS = ("mean", "sum")


class CausalLMTask(Task):
    """An example's loss is the cross-entropy of its own tokens: of the completion's, or of all of a plain text's.

    Args:
        model: the model's folder, or those of its checkpoints in training order (a list, or separated by commas); one
            with `checkpoint-*` subfolders, as the Trainer writes, stands for these. An adapter's folder will do.
        data: a JSONL file with columns "prompt" and "completion", or "text". Not read to serve an index.
        loop: the layers that are applied again and again: names, globs and ranges such as "model.layers.8-27",
            separated by commas.
        marker: the module that begins a step. None: the first layer of the loop's first range.
        outside: attribute to the parameters outside the loop too.
        learning_rate: of all checkpoints, or one for each. None: what the Trainer recorded, else 1.
        max_length: tokens that are read of a text. None: 512, or what the model can read where that is less.
        answer_only: whether a prompt's own tokens don't count.
        reduction: "mean" or "sum", of the counted tokens' losses.
        tokenizer: its folder, or "bytes" for a model that reads bytes. None: that in the model's folder.
        base: the folder of the model that an adapter belongs to. None: the one that the adapter names.
        prompt_column, completion_column, text_column: the data's names of them.
        separator: put between a prompt and its completion.
        dtype: of the parameters.
        attention: "sdpa" or "eager". None: "sdpa" where the model has it.
    """

    def __init__(
        self,
        model: str | Sequence[str],
        data: str | None = None,
        loop: str | Sequence[str] | None = None,
        *,
        marker: str | None = None,
        outside: bool = False,
        learning_rate: float | str | Sequence[float] | None = None,
        max_length: int | None = None,
        answer_only: bool = True,
        reduction: str = "mean",
        tokenizer: str | None = None,
        base: str | None = None,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        text_column: str = "text",
        separator: str = "",
        dtype: str = "float32",
        attention: str | None = None,
    ) -> None:
        _check_choice("reduction", reduction, REDUCTIONS)
        _check_choice("dtype", dtype, tuple(DTYPES))
        _check_choice("attention", attention, (None, *ATTENTIONS))
        self._folders = find_folders(model)
        self._data = data
        self._learning_rate, self._max_length = learning_rate, max_length
        self._answer_only, self._reduction = answer_only, reduction
        self._tokenizer, self._base = tokenizer, base
        self._columns = Columns(
            prompt=prompt_column, completion=completion_column, text=text_column, separator=separator
        )
        # Here, so that a wrong name is told before any text is tokenized or any weight is loaded.
        names = skeleton(self._base_of(self._folders[0]))
        self._dtype, self._attention = DTYPES[dtype], attention or attention_of(names)
        prefix = ADAPTER_PREFIX if is_adapter(self._folders[0]) else ""
        self.loop = read_loop(loop, names, marker=marker, outside=outside, prefix=prefix)

    def checkpoints(self) -> Sequence[Checkpoint]:
        return self._checkpoints

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        folder = folder_of(checkpoint)
        return load_model(folder, self._base_of(folder), dtype=self._dtype, attention=self._attention)

    def second_moments(self, checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
        folder = folder_of(checkpoint)
        if not (folder / OPTIMIZER).is_file():
            return None
        model = self.model(checkpoint) if is_adapter(folder) else skeleton(folder)
        return read_second_moments(folder / OPTIMIZER, model)

    def examples(self) -> Sequence[Tokens]:
        return self._examples

    def collate(self, examples: Sequence[Tokens]) -> dict[str, Tensor]:
        return padded(examples)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        counted = labels != NOT_COUNTED  # [B, T-1]
        chosen = logits[:, :-1][counted]  # [counted tokens, V]: the others' losses are never made
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        values = functional.cross_entropy(chosen, labels[counted], reduction="none")
        sums = values.new_zeros(counted.shape).masked_scatter(counted, values).sum(1)  # [B]
        return sums if self._reduction == "sum" else sums / counted.sum(1)

    def example_from_json(self, obj: Any) -> Tokens:
        """The tokens of `{"prompt": ..., "completion": ...}` or `{"text": ...}`.

        With `"answer_only": false` the prompt's tokens count too; with `"position": k` token k alone does, counted from
        0 over the whole text: the answer is of the influence on that token.
        """
        query = read_query(obj, self._columns.separator)
        answer_only = self._answer_only if query.answer_only is None else query.answer_only
        return self._encoder.encode_query(query.passage, answer_only=answer_only, position=query.position)

    def metadata(self, row: int) -> dict[str, Any]:
        """The data's own columns, and how many tokens are read and whether the text was cut."""
        tokens = self._examples[row]
        return {**self._rows.columns[row], "num_tokens": len(tokens.ids), "is_cut": tokens.is_cut}

    def describe(self, row: int) -> str:
        tokens, text = self._examples[row], self._rows.passages[row].describe()
        return f"{text} [first {len(tokens.ids)} of {tokens.num_before_cut} tokens]" if tokens.is_cut else text

    def _base_of(self, folder: Path) -> Path:
        return base_folder(folder, self._base)

    @cached_property
    def _checkpoints(self) -> list[Checkpoint]:
        return find_checkpoints(self._folders, self._learning_rate)

    @cached_property
    def _rows(self) -> Rows:
        if self._data is None:
            raise TaskError("no examples were named; give data='path/to/file.jsonl' (--data on the command line)")
        return Rows.read(Path(self._data), self._columns)

    @cached_property
    def _examples(self) -> list[Tokens]:
        examples = self._encoder.encode(self._rows.passages, answer_only=self._answer_only)
        empty = [row for row, tokens in enumerate(examples) if not tokens.counted]
        if empty:
            raise TaskError(
                f"{len(empty)} examples of {self._data} have no token whose loss counts within the first "
                f"{self._encoder.max_length} (examples {', '.join(map(str, empty[:8]))}, counted from 0): raise "
                "max_length where the prompt alone is that long, give answer_only=False, or take them out"
            )
        return examples

    @cached_property
    def _encoder(self) -> Encoder:
        base = self._base_of(self._folders[-1])
        config = load_config(base).get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
        length = min(MAX_LENGTH, limit) if self._max_length is None else self._max_length
        if not isinstance(length, int) or not 2 <= length <= max(limit, 2):
            raise TaskError(f"max_length is {length!r}; this model reads 2 to {limit} tokens")
        tokenizer = load_tokenizer(self._tokenizer, [*run_folders(self._folders[-1]), base])
        return Encoder(tokenizer, max_length=length, vocabulary=config.vocab_size)


def _check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise TaskError(f"{name} is {value!r}, expected one of {', '.join(filter(None, choices))}")
