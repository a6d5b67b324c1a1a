"""How well coded sketches keep the order of dot products on an ordinary GPT-2, taken as a loop of one step.

N training examples, Q queries, W width.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from measurement import markdown_table
from sketch_accuracy import ready_sketcher
from sketch_models import Workload
from torch import Tensor

from loopsway.indexer import SketchConfig
from loopsway.indexer.sketches.coding import decode, encode, row_bytes
from loopsway.indexer.sketches.rotation import rotate


@dataclass(frozen=True, kw_only=True)
class RankingExtent:
    """How much is measured.

    Attributes:
        workload: model and batch; one step.
        num_train: N.
        num_queries: Q.
        training_steps: before gradients are taken.
        num_seeds: of the hashes.
        codes: our W, and the bits that each is coded to.
        k: of recall@k.
    """

    workload: Workload
    num_train: int
    num_queries: int
    training_steps: int
    num_seeds: int
    codes: dict[int, tuple[int, ...]]
    k: int = 10


def ranking_table(extent: RankingExtent, texts: Sequence[str]) -> str:
    """Pearson correlation, recall@k of the k largest and relative error (Frobenius) of N x Q dot products."""
    task = extent.workload.task(texts, training_steps=extent.training_steps)
    model, size = task.model(task.checkpoints()[0]), extent.workload.shape.batch
    train, queries = (
        [task.collate(part[start : start + size]) for start in range(0, len(part), size)]
        for part in (texts[: extent.num_train], texts[-extent.num_queries :])
    )

    def sketches(config: SketchConfig, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        sketcher = ready_sketcher(task, model, config, batches[0])
        return (sketcher.sketch(task.losses, batch).sum(1) for batch in batches)

    exact = SketchConfig(width=None)
    exact_queries = torch.cat(list(sketches(exact, queries)))
    truth = torch.cat([part @ exact_queries.T for part in sketches(exact, train)])  # [N, Q]
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for width, each in extent.codes.items():
        for seed in range(extent.num_seeds):
            config = SketchConfig(width=width, seed=seed)
            stored, asked = (rotate(torch.cat(list(sketches(config, part))), seed) for part in (train, queries))
            for bits in each:
                coded = encode(stored, bits)
                estimate = torch.from_numpy(decode(coded.codes, coded.factors, bits)) @ asked.T
                found.setdefault((width, bits), []).append(_scores(estimate, truth, extent.k))
    rows = []
    for (width, bits), scores in sorted(found.items(), key=lambda item: row_bytes(*item[0])):
        means = (f"{statistics.mean(values):.4f}" for values in zip(*scores, strict=True))
        rows.append((f"{row_bytes(width, bits):,}", str(width), str(bits), *means))
    header = ("bytes an example", "W", "bits", "Pearson", f"recall@{extent.k}", "relative error")
    return markdown_table(header, rows)


def _scores(estimate: Tensor, truth: Tensor, k: int) -> tuple[float, float, float]:
    pearson = torch.corrcoef(torch.stack([estimate.flatten(), truth.flatten()]))[0, 1]
    best, found = (values.topk(k, dim=0).indices for values in (truth, estimate))  # [k, Q]
    recall = (best[:, None] == found[None]).any(1).float().mean()
    return float(pearson), float(recall), float((estimate - truth).norm() / truth.norm())
