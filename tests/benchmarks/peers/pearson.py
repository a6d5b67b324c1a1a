"""How close stored gradients come to exact dot products, bergson's and ours, on workload (e).

    LOOPSWAY_GSM8K=... runs/peers-venv/bin/python tests/benchmarks/peers/pearson.py [--dense] [--smoke]

Make the environment with make_venv.sh, beside this file. N training examples, Q queries, W width. Exact gradients come
from autograd, one example at a time. How well any sketch keeps the order depends on how long the model was trained, so
compare rows of one table alone. Bytes are those of an example; ours has 8 more, its factor and its norm. bergson
stores float32, and asks with float32, as we do. Both take the same parameters, see gpt2.py.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from gpt2 import (
    LOOP,
    SMOKE,
    Bergson,
    Size,
    as_bergson_loads,
    exact_rows,
    freeze_all_but_weights,
    in_batches,
    texts_as_tokens,
    trained_model,
)
from measurement import markdown_table, parse_arguments
from models import losses
from torch import Tensor, nn

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import decode, encode, row_bytes
from loopsway.indexer.sketches.rotation import rotate


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        size: of model and batch.
        num_train: N.
        num_queries: Q.
        training_steps: before gradients are taken.
        projections: bergson's.
        codes: our W, and the bits that each is coded to.
        num_seeds: of our hashes and of bergson's matrices, but one for its global layout, which is slow.
        k: of recall@k.
    """

    size: Size
    num_train: int
    num_queries: int
    training_steps: int
    projections: tuple[Bergson, ...]
    codes: dict[int, tuple[int, ...]]
    num_seeds: int
    k: int = 10


FULL = Extent(
    size=Size(),
    num_train=512,
    num_queries=32,
    training_steps=100,
    projections=(Bergson(dimension=8), Bergson(dimension=16), Bergson(dimension=32)),
    codes={4096: (1,), 8192: (1, 4, 32), 32768: (1,)},
    num_seeds=3,
)
DENSE = (Bergson(dimension=256, layout="global"), Bergson(dimension=1024, layout="global"))
SMOKE_EXTENT = Extent(
    size=SMOKE,
    num_train=16,
    num_queries=4,
    training_steps=2,
    projections=(Bergson(dimension=4), Bergson(dimension=64, layout="global")),
    codes={256: (1, 32)},
    num_seeds=1,
    k=3,
)


def exact_products(model: nn.Module, train: Tensor, queries: Tensor) -> Tensor:
    """[N, Q]."""
    asked = torch.stack(list(exact_rows(model, queries)))
    return torch.stack([asked @ row for row in exact_rows(model, train)])


def our_products(model: nn.Module, train: Tensor, queries: Tensor, extent: Extent, seed: int) -> dict[str, Tensor]:
    """By name of the row, [N, Q]."""
    model = freeze_all_but_weights(copy.deepcopy(model))
    found = {}
    for width, each in extent.codes.items():
        sketcher = StepSketcher(model, LOOP, SketchConfig(width=width, seed=seed))
        stored, asked = (
            rotate(
                torch.cat([sketcher.sketch(losses, batch).sum(1) for batch in in_batches(part, extent.size.batch)]),
                seed,
            )
            for part in (train, queries)
        )
        for bits in each:
            coded = encode(stored, bits)
            name = f"{row_bytes(width, bits):,}|ours, W={width}, {bits} bits"
            found[name] = torch.from_numpy(decode(coded.codes, coded.factors, bits)) @ asked.T
    return found


def bergson_products(model: nn.Module, train: Tensor, queries: Tensor, extent: Extent, seed: int) -> dict[str, Tensor]:
    model = as_bergson_loads(copy.deepcopy(model))
    tokens, found = torch.cat([train, queries]), {}
    for projection in extent.projections:
        processor, batch = projection.processor(), extent.size.batch
        processor.projection_seed = seed
        if projection.layout == "global":  # it draws its whole matrix, a billion numbers or more, for every batch
            if seed:
                continue
            batch = -(-len(tokens) // 2)
        rows = projection.in_memory(model, tokens, batch, processor).double()
        found[f"{4 * rows.shape[1]:,}|{projection}"] = rows[: len(train)] @ rows[len(train) :].T
    return found


def scores(estimate: Tensor, truth: Tensor, k: int) -> tuple[float, float, float]:
    """Pearson correlation over all pairs, recall of each query's k largest, relative error (Frobenius)."""
    estimate, truth = estimate.double(), truth.double()
    pearson = torch.corrcoef(torch.stack([estimate.flatten(), truth.flatten()]))[0, 1]
    best, found = (values.topk(k, dim=0).indices for values in (truth, estimate))  # [k, Q]
    recall = (best[:, None] == found[None]).any(1).double().mean()
    return float(pearson), float(recall), float((estimate - truth).norm() / truth.norm())


def table(extent: Extent) -> str:
    tokens = texts_as_tokens(extent.size, extent.num_train + extent.num_queries)
    model = trained_model(extent.size, tokens, extent.training_steps)
    train, queries = tokens[: extent.num_train], tokens[-extent.num_queries :]
    truth = exact_products(model, train, queries)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(extent.num_seeds):
        for products in (bergson_products, our_products):
            for name, estimate in products(model, train, queries, extent, seed).items():
                found.setdefault(name, []).append(scores(estimate, truth, extent.k))
    rows = []
    for name, each in sorted(found.items(), key=lambda item: int(item[0].split("|")[0].replace(",", ""))):
        rows.append((*name.split("|"), *_means(each)))
    return markdown_table(("bytes", "layout", "Pearson", f"recall@{extent.k}", "relative error"), rows)


def _means(each: Sequence[tuple[float, float, float]]) -> list[str]:
    return [f"{statistics.mean(values):.3f}" for values in zip(*each, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="bergson's global layout too: many minutes")
    parser.add_argument("--training-steps", type=int, help="before gradients are taken (default: 100)")
    arguments = parse_arguments(parser)
    extent = SMOKE_EXTENT if arguments.smoke else FULL
    extent = replace(extent, training_steps=arguments.training_steps or extent.training_steps)
    if arguments.dense and not arguments.smoke:
        extent = replace(extent, projections=(*extent.projections, *DENSE))
    print(f"### {extent.num_train} x {extent.num_queries} pairs, {extent.num_seeds} seeds, "
          f"{extent.training_steps} steps of training, {extent.size}\n")  # fmt: skip
    print(table(extent))


if __name__ == "__main__":
    main()
