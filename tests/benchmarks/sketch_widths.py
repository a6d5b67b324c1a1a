"""The error of our influences against the width, measured and by theory, and its figure.

N examples, S steps, W width, O and I a matrix's rows and columns.

Of fused sketches of x and q with matrices A and B at parameter p, W times the variance of <x, q> is
|x|^2 |q|^2 + <x, q>^2 + 2 sum_p (|A^T B|^2 + |A B^T|^2) at most (Pham and Pagh 2013, Lemma 2; the parameters' hashes
are independent), and about the first two terms where the matrices are far from rank one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measurement import markdown_table, mean_and_deviation
from sketch_accuracy import Row, SelfInfluence
from torch import Tensor

CURVE_BITS = (32, 1)


@dataclass(frozen=True)
class Theory:
    """Of the relative error.

    Attributes:
        line: times the square root of W, without the matrices' terms.
        bound: times the square root of W, with them.
    """

    line: float
    bound: float

    @classmethod
    def of(cls, influence: SelfInfluence) -> Theory:
        norms = influence.total_norms[:, None, None] * influence.step_norms  # [N, N, S]
        square = float(influence.truth.square().mean())
        line = float(norms.square().mean()) + square
        bound = line + 2 * _mean_matrix_terms(influence)
        return cls(line=math.sqrt(line / square), bound=math.sqrt(bound / square))


@dataclass(frozen=True)
class Curve:
    """Measured rows beside the theory."""

    ours: list[Row]
    reference: list[Row]
    theory: Theory

    @classmethod
    def of(cls, influence: SelfInfluence, widths: Sequence[int], projections: Sequence[int]) -> Curve:
        ours = [row for width in widths for row in influence.our_rows(width, CURVE_BITS)]
        reference = [influence.reference_row(projection) for projection in projections]
        return cls(ours, reference, Theory.of(influence))

    def table(self) -> str:
        rows = []
        for row in (row for row in self.ours if row.bits == 32):
            line, bound = (value / math.sqrt(row.floats) for value in (self.theory.line, self.theory.bound))
            coded = next(other for other in self.ours if other.floats == row.floats and other.bits == 1)
            measured = (mean_and_deviation(row.errors), mean_and_deviation(coded.errors))
            predicted = (f"{line:.3f}", f"{bound:.3f}", f"{row.error / line:.2f}", f"{coded.error / row.error:.2f}")
            rows.append((str(row.floats), *measured, *predicted))
        header = ("W", "error, 32 bits", "error, 1 bit", "theory's line", "theory's bound", "32 bits / line",
                  "1 bit / 32 bits")  # fmt: skip
        return markdown_table(header, rows)

    def draw(self, path: Path, title: str) -> list[Path]:
        """Writes the figure as PNG and SVG, under the path's name without its suffix."""
        import matplotlib as mpl  # slow to import, and drawn only on request

        mpl.use("Agg")
        mpl.rcParams["svg.hashsalt"] = "loopsway"  # the same file each time
        from matplotlib import pyplot, ticker

        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        widths = [row.floats for row in self.ours if row.bits == 32]
        line, bound = (
            [value / math.sqrt(width) for width in widths] for value in (self.theory.line, self.theory.bound)
        )
        axes.fill_between(widths, line, bound, color="tab:blue", alpha=0.15, linewidth=0)
        axes.plot(widths, line, color="tab:blue", linewidth=1, label=r"theory: $\sqrt{c/W}$, and its upper bound")
        curves = {
            "reference, 32 bits": (self.reference, "tab:red", "s"),
            "ours, 1 bit": ([row for row in self.ours if row.bits == 1], "tab:orange", "v"),
            "ours, 32 bits": ([row for row in self.ours if row.bits == 32], "tab:blue", "o"),
        }
        for label, (rows, color, marker) in curves.items():
            errors = torch.tensor([row.errors for row in rows])  # [rows, seeds]
            spread = errors.std(1, correction=0)
            axes.errorbar([row.floats for row in rows], errors.mean(1), spread, label=label, color=color,
                          marker=marker, markersize=5, linestyle="none", capsize=2)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="numbers stored for an example's step", ylabel="relative error")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(widths, [str(width) for width in widths], minor=False, rotation=45)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
        return paths


def _mean_matrix_terms(influence: SelfInfluence) -> float:
    """The mean over all pairs of sum_p (|A^T B|^2 + |A B^T|^2), by Gram matrices: |A^T B|^2 = <A A^T, B B^T>."""
    total, count = 0.0, influence.truth.numel()
    for steps in influence.step_gradients():
        start = 0
        for shape in influence.shapes.values():
            end = start + math.prod(shape)
            if len(shape) == 2:
                left = influence.totals[:, start:end].unflatten(1, shape)  # [N, O, I]
                right = steps[:, :, start:end].flatten(0, 1).unflatten(1, shape)  # [B S, O, I]
                total += _sum_of_products(left, right)
                total += _sum_of_products(left.transpose(1, 2), right.transpose(1, 2))
            start = end
    return total / count


def _sum_of_products(left: Tensor, right: Tensor) -> float:
    """Sum over pairs of |A^T B|^2: the sums of the two sides' Gram matrices have the sum as inner product."""
    sides = (torch.einsum("noi,npi->op", side, side).double() for side in (left, right))
    return float(torch.mul(*sides).sum())
