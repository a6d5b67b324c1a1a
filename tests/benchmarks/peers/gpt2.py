"""Workload (e): an ordinary GPT-2 of transformers on the bytes of GSM8K or of made-up sums, and bergson on it.

N examples, T bytes, P parameters. What is attributed are the weight matrices of the layers (four in each), which is
what bergson takes by default; all else is frozen for ours and left out of the truth.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, collect_gradients
from datasets import Dataset
from models import losses
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from loopsway.experiments.texts import DATA_VARIABLE, gsm8k_folder, gsm8k_texts, synthetic_texts
from loopsway.indexer import Loop

LOOP = Loop(body=["transformer.h.*"])
NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and its batches."""

    dim: int = 256
    num_layers: int = 4
    length: int = 128
    batch: int = 16


SMOKE = Size(dim=32, num_layers=2, length=16, batch=4)


def trained_model(size: Size, tokens: Tensor, steps: int) -> Any:
    """GPT2LMHeadModel after some steps of AdamW, from a fixed seed."""
    config = GPT2Config(
        vocab_size=NUM_BYTES, n_embd=size.dim, n_layer=size.num_layers, n_head=size.dim // 32, n_positions=size.length,
        bos_token_id=None, eos_token_id=None, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        start = step * size.batch % max(1, len(tokens) - size.batch)
        optimizer.zero_grad()
        (losses(model, tokens[start : start + size.batch]).mean() / size.length).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def texts_as_tokens(size: Size, count: int) -> Tensor:
    """The first T bytes of `count` texts that are long enough, [N, T] int64."""
    folder = gsm8k_folder()
    if folder is None:
        print(f"GSM8K is skipped: {DATA_VARIABLE} names no folder with gsm8k_train.jsonl; these are sums in words\n")
        texts = ["\n".join(synthetic_texts(4 * count)[row::count]) for row in range(count)]
    else:
        texts = [text for text in gsm8k_texts(folder, 2 * count) if len(text.encode()) >= size.length]
    return torch.tensor([list(text.encode()[: size.length]) for text in texts[:count]])


def weight_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]


def freeze_all_but_weights(model: nn.Module) -> nn.Module:
    wanted = set(weight_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return model


def exact_rows(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Each example's gradient [P], by autograd."""
    wanted = dict(model.named_parameters())
    parameters = [wanted[name] for name in weight_names(model)]
    for example in tokens:
        gradients = torch.autograd.grad(losses(model, example[None]).sum(), parameters)
        yield torch.cat([gradient.flatten() for gradient in gradients])


@dataclass(frozen=True, kw_only=True)
class Bergson:
    """Its gradient collection with one choice of projection.

    Attributes:
        dimension: of the projection.
        layout: "per_module" is its default, `dimension` x `dimension` numbers for each weight matrix; "global" is
            `dimension` numbers in all, by a dense random matrix.
    """

    dimension: int
    layout: Literal["per_module", "global"] = "per_module"

    def __str__(self) -> str:
        size = f"{self.dimension} x {self.dimension} a module" if self.layout == "per_module" else f"{self.dimension}"
        return f"bergson, {self.layout}, {size}"

    def processor(self) -> GradientProcessor:
        return GradientProcessor(projection_dim=self.dimension, projection_target=self.layout)

    def in_memory(self, model: Any, tokens: Tensor, batch: int, processor: GradientProcessor | None = None) -> Tensor:
        """Its gradients of all examples, [N, stored floats]."""
        data, batches = self._data(tokens, batch)
        with tempfile.TemporaryDirectory() as folder, quiet():
            config = _config(folder)
            config.partial_run_path.mkdir()
            collector = InMemoryCollector(
                model=model.base_model, data=data, cfg=config, processor=processor or self.processor()
            )
            CollectorComputer(model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
        return torch.cat([rows.flatten(1) for rows in collector.gradients.values()], dim=1)

    def to_disk(self, model: Any, tokens: Tensor, batch: int, processor: GradientProcessor) -> None:
        """What its command `bergson build` runs once the model is loaded."""
        data, batches = self._data(tokens, batch)
        with tempfile.TemporaryDirectory() as folder, quiet():
            config = _config(folder)
            config.partial_run_path.mkdir()
            collect_gradients(model, data, processor, config, batches=batches)

    def _data(self, tokens: Tensor, batch: int) -> tuple[Dataset, list[list[int]]]:
        rows = range(len(tokens))
        data = Dataset.from_dict({"input_ids": tokens.tolist(), "length": [tokens.shape[1]] * len(tokens)})
        return data, [list(rows[start : start + batch]) for start in rows[::batch]]


def as_bergson_loads(model: Any) -> Any:
    """Weights are frozen but for the embeddings, from which the backward pass needs to start."""
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def _config(folder: str) -> IndexConfig:
    return IndexConfig(run_path=str(Path(folder, "run")))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor logs."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def in_batches(tokens: Tensor, batch: int) -> Sequence[Tensor]:
    return tokens.split(batch)
