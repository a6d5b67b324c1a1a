"""Figure 4: the error of influences against the numbers stored for an example's step, ours and the reference's.

N examples, S steps, W width, P entries of the loop's gradient, m the reference's floats for each parameter tensor.

Examples are compared with themselves: the error is that of the block [N, N, S] of influences of every example on every
example at each step, relative to the exact block (Frobenius norm), over several draws of the hashes. The side that asks
is float32. Theory's line is sqrt((|x|^2 |q|^2 + <x, q>^2) / W), the mean over pairs, relative to the exact block; it
leaves out the terms that a matrix's inner structure adds (Pham and Pagh 2013).
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from sdi import ProjectedTracInSDI
from sdi.estimators import compute_query_sdi
from torch import Tensor

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import decode, encode, rotate
from loopsway.tasks.parity import ParityTask
from loopsway.tasks.parity_training import is_trained, train

from .findings import BLUE, GREY, ORANGE, PURPLE, Claim, Findings, dress
from .parity import SEED, recipe
from .parity import SETTINGS as PARITY_SETTINGS

BITS = (32, 1)
CLOSE = 1.5  # times theory's line, at the most: three standard errors of the mean of 10 draws
KINDS = {
    "ours, 32 bits": (BLUE, "o"),
    "ours, 1 bit": (PURPLE, "v"),
    "reference, 32 bits": (ORANGE, "s"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is measured.

    Attributes:
        parity: size of the parity training.
        num_examples: N.
        num_draws: of the hashes.
        widths: our W.
        projections: the reference's m.
    """

    parity: str
    num_examples: int
    num_draws: int
    widths: tuple[int, ...]
    projections: tuple[int, ...]


SETTINGS = {
    "tiny": Setting(parity="tiny", num_examples=6, num_draws=2, widths=(128, 512), projections=(16,)),
    "small": Setting(
        parity="small", num_examples=64, num_draws=10, widths=(256, 1024, 4096, 16384), projections=(21, 85, 341, 1365)
    ),
    "full": Setting(
        parity="small",
        num_examples=512,
        num_draws=10,
        widths=tuple(256 << power for power in range(9)),
        projections=(21, 42, 85, 170, 341, 682, 1365, 2730, 5461),
    ),
}


def run(size: str, folder: Path, device: str, progress: bool) -> Findings:
    """Trains parity, or takes the training that the folder has, and measures on the last checkpoint."""
    setting, run = SETTINGS[size], folder / "parity"
    if not is_trained(run):
        train(run, seed=SEED, progress=progress, recipe=recipe(PARITY_SETTINGS[setting.parity]))
    block = Block(ParityTask(str(run)), setting.num_examples, device)
    errors: list[tuple[str, int, int, float]] = []
    for draw in range(setting.num_draws):
        for width in setting.widths:
            errors += [(f"ours, {bits} bit{'s' * (bits > 1)}", width, draw, error)
                       for bits, error in block.our_errors(width, draw).items()]  # fmt: skip
        for projection in setting.projections:
            floats = projection * block.num_tensors
            errors.append(("reference, 32 bits", floats, draw, block.reference_error(projection, draw)))
    names = ("kind", "floats", "draw", "error")
    data = pa.table({name: list(column) for name, column in zip(names, zip(*errors, strict=True), strict=True)})
    means = _means(data)
    return Findings(
        setting=setting, data=data, figure=_draw(data, block.line, setting), claims=_claims(means, block.line)
    )


class Block:
    """Examples, their exact influences on one another, and estimates of these.

    Attributes:
        num_tensors: of the loop's body.
        line: theory's, times the square root of W.
    """

    def __init__(self, task: ParityTask, num_examples: int, device: str) -> None:
        self._task, checkpoint = task, task.checkpoints()[-1]
        self._model = task.model(checkpoint).to(device)
        examples = task.examples()
        chosen = examples[:: max(1, len(examples) // num_examples)][:num_examples]
        self._batch = {name: tensor.to(device) for name, tensor in task.collate(chosen).items()}
        steps = self._steps(SketchConfig(width=None))
        self._truth = _influences(steps.sum(1), steps)
        self.num_tensors = sum(1 for _ in self._model.get_submodule("block").parameters())
        norms = steps.sum(1).norm(dim=1)[:, None, None] * steps.norm(dim=2)
        self.line = math.sqrt(float((norms.square() + self._truth.square()).mean() / self._truth.square().mean()))

    def our_errors(self, width: int, draw: int) -> dict[int, float]:
        """By bits."""
        steps = rotate(self._steps(SketchConfig(width=width, seed=draw)), draw)
        errors = {}
        for bits in BITS:
            coded = encode(steps.sum(1), bits)
            stored = torch.from_numpy(decode(coded.codes, coded.factors, bits))
            errors[bits] = self._error(_influences(stored, steps))
        return errors

    def reference_error(self, projection: int, draw: int) -> float:
        model = copy.deepcopy(self._model)  # its hooks would slow ours down
        estimator = ProjectedTracInSDI(
            model=model, target_modules=model.get_submodule("block"), projection_size=projection, seed=draw
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            features = estimator.featurize_loader(loader=[self._batch], loss_fn=self._task.losses)
        estimator.close()
        return self._error(compute_query_sdi(train=features, query=features).cpu())

    def _steps(self, config: SketchConfig) -> Tensor:
        return StepSketcher(self._model, self._task.loop, config).sketch(self._task.losses, self._batch).cpu()

    def _error(self, estimate: Tensor) -> float:
        return float((estimate - self._truth).norm() / self._truth.norm())


def _influences(totals: Tensor, steps: Tensor) -> Tensor:
    """[N, P] and [N, S, P] give [N, N, S]."""
    return torch.einsum("np,qsp->nqs", totals, steps)


def _means(data: pa.Table) -> dict[str, dict[int, float]]:
    """Of the draws' errors, by kind and floats."""
    rows = data.group_by(["kind", "floats"]).aggregate([("error", "mean")]).to_pylist()
    return {kind: {row["floats"]: row["error_mean"] for row in rows if row["kind"] == kind} for kind in KINDS}


def _claims(means: dict[str, dict[int, float]], line: float) -> list[Claim]:
    ours, reference = means["ours, 32 bits"], means["reference, 32 bits"]
    ratios = {width: error * math.sqrt(width) / line for width, error in ours.items()}
    near = {floats: max(width for width in ours if width <= max(floats, min(ours)) * 1.05) for floats in reference}
    beside = {floats: ours[width] / reference[floats] for floats, width in near.items()}
    low, widest = min(ours.values()), max(ours)
    return [
        Claim(
            claim="sketched influences match those of full gradients with low error",
            paper="SDI matches full-gradient baselines with low error (abstract)",
            seen=f"relative error {low:.3f} at W = {widest:,}, the widest",
            agrees=low < 0.1 if widest >= 8192 else None,
        ),
        Claim(
            claim="the error is no more than theory allows, which falls as one over the square root of the width",
            paper="not checked against the paper's text; follows from the sketch's variance",
            seen="error over theory's line: " + ", ".join(f"{ratio:.2f} at W = {w:,}" for w, ratio in ratios.items()),
            agrees=max(ratios.values()) < CLOSE if widest >= 8192 else None,
        ),
        Claim(
            claim="one fused sketch for all parameters is no worse than the reference's one for each",
            paper="not checked against the paper's text; the reference keeps a sketch for each parameter",
            seen="ours over the reference's error: "
            + ", ".join(f"{ratio:.2f} at {floats:,} floats" for floats, ratio in beside.items()),
            agrees=None,
        ),
    ]


def _draw(data: pa.Table, line: float, setting: Setting) -> Figure:
    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    widths = np.array(setting.widths)
    axes.plot(widths, line / np.sqrt(widths), color=GREY, linewidth=1, label=r"theory: $\sqrt{c/W}$")
    kinds, floats, errors = (data[name].to_numpy() for name in ("kind", "floats", "error"))
    for kind, (colour, marker) in KINDS.items():
        sizes = np.unique(floats[kinds == kind])
        found = [errors[(kinds == kind) & (floats == size)] for size in sizes]
        mean, spread = [each.mean() for each in found], [each.std() for each in found]
        axes.errorbar(
            sizes, mean, spread, label=kind, color=colour, marker=marker, markersize=5, linewidth=1, capsize=2
        )
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False)
    title = f"Error of influences, {setting.num_draws} draws (bars: standard deviation)"
    dress(axes, title, "numbers stored for an example's step", "relative error")
    return figure
