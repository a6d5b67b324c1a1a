"""Figure 4: the error of influences against the numbers stored for an example's step, ours and the reference's.

N examples, S steps, W width, P entries of the loop's gradient, m the reference's floats for each parameter tensor.

Examples are compared with themselves: the error is that of the block [N, N, S] of influences of every example on every
example at each step, relative to the exact block (Frobenius norm), over several draws of the hashes. The side that asks
is float32. Theory's line is sqrt((|x|^2 |q|^2 + <x, q>^2) / W), the mean over pairs, relative to the exact block; it
leaves out the terms that a matrix's inner structure adds (Pham and Pagh 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from loopsway.tasks.parity import ParityTask
from loopsway.tasks.parity_training import is_trained, train

from .accuracy import SelfInfluence
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
    task = ParityTask(str(run))
    model, examples = task.model(task.checkpoints()[-1]).to(device), task.examples()
    chosen = examples[:: max(1, len(examples) // setting.num_examples)][: setting.num_examples]
    batches = [
        {name: tensor.to(device) for name, tensor in task.collate(part).items()} for part in (chosen, chosen[:2])
    ]
    block = SelfInfluence(task, model, "block", batches[:1], batches[1])
    line = theory_line(block)
    errors: list[tuple[str, int, int, float]] = []
    for draw in range(setting.num_draws):
        for width in setting.widths:
            errors += [(f"ours, {bits} bit{'s' * (bits > 1)}", width, draw, error)
                       for bits, error in block.our_errors(width, BITS, draw).items()]  # fmt: skip
        for projection in setting.projections:
            floats = projection * len(block.shapes)
            errors.append(("reference, 32 bits", floats, draw, block.reference_error(projection, draw)))
    names = ("kind", "floats", "draw", "error")
    data = pa.table({name: list(column) for name, column in zip(names, zip(*errors, strict=True), strict=True)})
    means = _means(data)
    return Findings(setting=setting, data=data, figure=_draw(data, line, setting), claims=_claims(means, line))


def theory_line(block: SelfInfluence) -> float:
    """Times the square root of W."""
    norms = block.total_norms[:, None, None] * block.step_norms
    return math.sqrt(float((norms.square() + block.truth.square()).mean() / block.truth.square().mean()))


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
