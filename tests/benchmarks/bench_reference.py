"""Error, stored bytes and time of our influences, side by side with those of step-decomposed-influence 0.1.1.

    python tests/benchmarks/bench_reference.py [--smoke]

The error is that of the QUERY_STEP influences [N, Q, S] of N training examples on Q queries at S steps, relative to
the exact ones (Frobenius norm), over several seeds of the hashes. A row is what is stored for one example and step:
of the reference, m float32 numbers for each parameter tensor, which it holds in memory; of ours, W coded coordinates
and two float32 numbers.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from measurement import markdown_table, mean_and_deviation, parse_arguments
from sdi import ProjectedTracInSDI
from sdi.estimators import compute_query_sdi
from torch import Tensor

from loopsway.experiments.looped_gpt import GPTTask, LoopedGPT, Shape
from loopsway.experiments.texts import DATA_VARIABLE, gsm8k_folder, gsm8k_texts, synthetic_texts
from loopsway.experiments.timing import median_seconds
from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import code_examples, decode, encode, row_bytes
from loopsway.indexer.sketches.rotation import rotate

FACTOR_AND_NORM_BYTES = 8
BITS = (32, 8, 1)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        shape: of the model.
        num_train: N.
        num_queries: Q.
        training_steps: before gradients are taken.
        projections: the reference's m.
        widths: our W; each is coded to every number of BITS.
        num_seeds: over which mean and standard deviation of the errors are taken.
    """

    shape: Shape
    num_train: int
    num_queries: int
    training_steps: int
    projections: tuple[int, ...]
    widths: tuple[int, ...]
    num_seeds: int


FULL = Extent(
    shape=Shape(dim=96),
    num_train=64,
    num_queries=16,
    training_steps=100,
    projections=(64, 256, 1024),
    widths=(1024, 2048, 4096, 8192, 32768),
    num_seeds=5,
)
SMOKE = Extent(
    shape=Shape(dim=32, num_steps=2, num_bytes=24, batch=4),
    num_train=8,
    num_queries=2,
    training_steps=2,
    projections=(16,),
    widths=(256,),
    num_seeds=2,
)


class Comparison:
    """One trained model and its examples, in batches."""

    def __init__(self, extent: Extent, texts: Sequence[str]) -> None:
        self.extent = extent
        self.task = GPTTask(extent.shape, texts, training_steps=extent.training_steps)
        model = self.task.model(self.task.checkpoints()[0])
        assert isinstance(model, LoopedGPT)
        self.model = model
        self.num_tensors = sum(1 for _ in self.model.block.parameters())
        self.train = self._batches(texts[: extent.num_train])
        self.queries = self._batches(texts[-extent.num_queries :])
        exact = StepSketcher(self.model, self.task.loop, SketchConfig(width=None))
        totals = torch.cat([self._sketch(exact, batch).sum(1) for batch in self.train])
        parts = [_query_step(totals, self._sketch(exact, batch)) for batch in self.queries]
        self.truth = torch.cat(parts, dim=1)

    def our_errors(self, width: int) -> dict[int, list[float]]:
        """By bits; one for each seed."""
        errors: dict[int, list[float]] = {bits: [] for bits in BITS}
        for seed in range(self.extent.num_seeds):
            sketcher = StepSketcher(self.model, self.task.loop, SketchConfig(width=width, seed=seed))
            totals = torch.cat([rotate(self._sketch(sketcher, batch).sum(1), seed) for batch in self.train])
            queries = torch.cat([rotate(self._sketch(sketcher, batch), seed) for batch in self.queries])
            for bits, found in errors.items():
                coded = encode(totals, bits)
                estimate = _query_step(torch.from_numpy(decode(coded.codes, coded.factors, bits)), queries)
                found.append(self._error(estimate))
        return errors

    def reference_errors(self, projection: int) -> list[float]:
        errors = []
        for seed in range(self.extent.num_seeds):
            estimator = self.reference(self.model, projection, seed)
            train, queries = (
                estimator.featurize_loader(loader=batches, loss_fn=self.task.losses)
                for batches in (self.train, self.queries)
            )
            estimator.close()
            errors.append(self._error(compute_query_sdi(train=train, query=queries)))
        return errors

    def reference(self, model: LoopedGPT, projection: int, seed: int = 0) -> ProjectedTracInSDI:
        return ProjectedTracInSDI(model=model, target_modules=model.block, projection_size=projection, seed=seed)

    def relative_times(self, repeats: int) -> dict[str, float]:
        """Time of each way for one batch, relative to a plain forward and backward of all parameters."""
        batch = self.train[0]

        def plain() -> None:
            self.model.zero_grad()
            self.task.losses(self.model, batch).sum().backward()

        calls: dict[str, Callable[[], object]] = {"plain": plain}
        for projection in self.extent.projections:  # each on a copy of the model: its hooks would slow the other calls
            estimator = self.reference(copy.deepcopy(self.model), projection)
            calls[f"m={projection}"] = partial(estimator.featurize_loader, loader=[batch], loss_fn=self.task.losses)
        for width in self.extent.widths:
            sketcher = StepSketcher(self.model, self.task.loop, SketchConfig(width=width))
            sketches = self._sketch(sketcher, batch)
            calls[f"W={width}"] = partial(self._sketch, sketcher, batch)
            for bits in BITS:
                calls[f"W={width}, {bits}"] = partial(code_examples, sketches, seed=0, bits=bits)
        seconds = median_seconds(calls, repeats)
        return {name: value / seconds["plain"] for name, value in seconds.items()}

    def _batches(self, texts: Sequence[str]) -> list[Tensor]:
        size = self.extent.shape.batch
        return [self.task.collate(texts[start : start + size]) for start in range(0, len(texts), size)]

    def _sketch(self, sketcher: StepSketcher, batch: Tensor) -> Tensor:
        return sketcher.sketch(self.task.losses, batch)

    def _error(self, estimate: Tensor) -> float:
        return float((estimate - self.truth).norm() / self.truth.norm())


def _query_step(totals: Tensor, queries: Tensor) -> Tensor:
    """[N, P] and [Q, S, P] give [N, Q, S]."""
    return torch.einsum("np,qsp->nqs", totals, queries)


def table(comparison: Comparison, repeats: int) -> str:
    times, steps = comparison.relative_times(repeats), comparison.extent.shape.num_steps
    rows = []
    for projection in comparison.extent.projections:
        size, error = (
            4 * projection * comparison.num_tensors,
            mean_and_deviation(comparison.reference_errors(projection)),
        )
        rows.append(_row(f"reference, m={projection}", 32, size, size * steps, error, times[f"m={projection}"]))
    for width in comparison.extent.widths:
        for bits, errors in comparison.our_errors(width).items():
            size = row_bytes(width, bits) + FACTOR_AND_NORM_BYTES
            time = times[f"W={width}"] + times[f"W={width}, {bits}"]
            rows.append(_row(f"ours, W={width}", bits, size, size * (steps + 1), mean_and_deviation(errors), time))
    header = ("sketch", "bits", "bytes a row", "bytes an example", "relative error", "time / plain step")
    return markdown_table(header, rows)


def _row(name: str, bits: int, row_size: int, example_size: int, error: str, time: float) -> tuple[str, ...]:
    return name, str(bits), f"{row_size:,}", f"{example_size:,}", error, f"{time:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="number of seeds of the hashes (default: 5)")
    arguments = parse_arguments(parser)
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # of the reference's hooks
    extent = SMOKE if arguments.smoke else FULL
    extent = replace(extent, num_seeds=arguments.seeds or extent.num_seeds)
    count = 2 * (extent.num_train + extent.num_queries)
    sources = {"sums in words": synthetic_texts(count)}
    if (folder := gsm8k_folder()) is not None:
        sources["GSM8K"] = gsm8k_texts(folder, count)
    else:
        print(f"GSM8K is skipped: {DATA_VARIABLE} names no folder with gsm8k_train.jsonl\n")
    for source, texts in sources.items():
        for bare in (False, True):
            shape = replace(extent.shape, bare=bare)
            comparison = Comparison(replace(extent, shape=shape), texts)
            print(f"### {shape}; {source}; {comparison.num_tensors} tensors, {extent.num_train} x "
                  f"{extent.num_queries} pairs, {extent.num_seeds} seeds\n")  # fmt: skip
            print(table(comparison, arguments.repeats), flush=True, end="\n\n")


if __name__ == "__main__":
    main()
