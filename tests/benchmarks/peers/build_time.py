"""What collecting gradients costs beside a plain training step, other tools' way and ours, on workload (e).

    LOOPSWAY_GSM8K=... runs/peers-venv/bin/python tests/benchmarks/peers/build_time.py [--smoke]

Make the environment with make_venv.sh, beside this file. A plain step is forward and backward of all parameters. Every
row does the same batches, in turns in one process, each on its own copy of the model; medians, by the clock on the
wall, so the machine must be quiet. bergson and LogIX freeze the weights themselves; "in memory" leaves out bergson's
files. LogIX and Kronfluence know no Conv1D, so their copies have nn.Linear. Kronfluence stores nothing: the row is its
pass over the batches for one batch of queries, all again for the next.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpt2 import (
    LOOP,
    SMOKE,
    Bergson,
    Size,
    as_bergson_loads,
    freeze_all_but_weights,
    in_batches,
    quiet,
    texts_as_tokens,
    trained_model,
)
from measurement import markdown_table, parse_arguments
from models import losses, with_linear
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from loopsway.experiments.timing import median_seconds
from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import code_examples

WIDTHS = (8192, 32768)
BERGSON = (Bergson(dimension=16), Bergson(dimension=32))
LOGIX_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured: batches in one call."""

    size: Size
    num_batches: int


def calls(extent: Extent, model: nn.Module, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    batches = in_batches(tokens, extent.size.batch)
    found: dict[str, Callable[[], Any]] = {"plain forward and backward": partial(_plain, copy.deepcopy(model), batches)}
    for projection in BERGSON:
        processor = projection.processor()  # its matrices are made once
        frozen = as_bergson_loads(copy.deepcopy(model))
        arguments = (frozen, tokens, extent.size.batch, processor)
        found[f"{projection}, in memory"] = partial(projection.in_memory, *arguments)
        found[f"{projection}, to disk"] = partial(projection.to_disk, *arguments)
    found[f"LogIX, {LOGIX_RANK} x {LOGIX_RANK} a module"] = _logix(copy.deepcopy(model), batches)
    found[f"Kronfluence, scores of {extent.size.batch} queries"] = _kronfluence(copy.deepcopy(model), batches)
    for width in WIDTHS:
        weights = freeze_all_but_weights(copy.deepcopy(model))
        sketcher = StepSketcher(weights, LOOP, SketchConfig(width=width))
        found[f"ours, W={width}"] = partial(_sketch, sketcher, batches, bits=None)
        found[f"ours, W={width}, coded to 1 bit"] = partial(_sketch, sketcher, batches, bits=1)
    every = StepSketcher(copy.deepcopy(model), LOOP, SketchConfig(width=WIDTHS[0]))
    found[f"ours, W={WIDTHS[0]}, biases and norms too"] = partial(_sketch, every, batches, bits=None)
    return found


def _plain(model: nn.Module, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model.zero_grad()
        losses(model, batch).sum().backward()


def _sketch(sketcher: StepSketcher, batches: Sequence[Tensor], bits: int | None) -> None:
    for batch in batches:
        sketches = sketcher.sketch(losses, batch)
        if bits is not None:
            code_examples(sketches, seed=0, bits=bits)


def _logix(model: Any, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Its low-rank gradients of all weight matrices, logged to memory."""
    from logix import LogIX
    from logix.config import LoRAConfig

    model = with_linear(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = Path(folder, "logix.yaml")
        settings.write_text(f"root_dir: {folder}\n")
        run = LogIX("time", config=str(settings))
        run.watch(model, name_filter=["transformer.h"])
        run.add_lora(lora_config=LoRAConfig(rank=LOGIX_RANK))
        run.setup({"grad": ["log"]})

    def collect() -> None:
        for batch in batches:
            with run(data_id=[str(row) for row in range(len(batch))]):
                losses(model, batch).sum().backward()
            run.get_log()

    return collect


def _kronfluence(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Dot products of a batch of queries with all examples, in a folder that is forgotten each time."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            del sample
            return losses(model, batch[0]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return losses(model, batch[0]).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

    model = with_linear(model)
    modules = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer")
    ]
    data, queries, count = TensorDataset(torch.cat(list(batches))), TensorDataset(batches[0]), len(batches[0])
    prepared = prepare_model(model, Summed())

    def score() -> None:
        with tempfile.TemporaryDirectory() as folder, quiet():
            analyzer = Analyzer("time", prepared, Summed(), cpu=True, output_dir=folder, disable_tqdm=True)
            analyzer.fit_all_factors("identity", data, factor_args=FactorArguments(strategy="identity"))
            analyzer.compute_pairwise_scores("time", "identity", queries, data, count, count)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse_arguments(parser, threads=2)
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # of LogIX's hooks
    extent = Extent(size=SMOKE, num_batches=2) if arguments.smoke else Extent(size=Size(), num_batches=4)
    tokens = texts_as_tokens(extent.size, extent.num_batches * extent.size.batch)
    model = trained_model(extent.size, tokens, steps=2)
    seconds = median_seconds(calls(extent, model, tokens), arguments.repeats)
    plain = next(iter(seconds.values()))
    print(f"### {extent.num_batches} batches of {extent.size}, {arguments.threads} threads, "
          f"median of {arguments.repeats}\n")  # fmt: skip
    rows = [
        (name, f"{1e3 * value / extent.num_batches:.0f}", f"{value / plain:.2f}") for name, value in seconds.items()
    ]
    print(markdown_table(("way", "ms a batch", "time / plain step"), rows))


if __name__ == "__main__":
    main()
