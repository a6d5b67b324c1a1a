"""Figure 3: how much influence each pass through the loop has, and of which sign, by the number of passes.

Q queries, S loops.

For each horizon, a number of loops, a language model over the bytes of GSM8K is trained with backpropagation through
all of its loops. The models of a seed begin with the same weights and see the same texts in the same order. The index
of each holds its training texts at checkpoints along the training; problems of the test split ask it. A loop's signed
share is the sum of its influences over the training texts, over the query's energy, the sum of |influence| over texts
and loops: were all influences positive, the shares would add up to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from scipy.stats import t

from loopsway.indexer import Estimate, ExampleSketcher, SketchConfig, build_index, step_energies

from .evaluation.subject import Course
from .evaluation.text import ByteSubject
from .evaluation.training import train_with_checkpoints
from .findings import BLUE, GREEN, GREY, ORANGE, UNCHECKED, Claim, Findings, adds_up, difference_from_tracin, dress
from .looped_gpt import Shape
from .texts import DATA_VARIABLE, SOURCE, gsm8k_folder, gsm8k_texts, synthetic_texts

COLOURS = (BLUE, ORANGE, GREEN)
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is trained and asked.

    Attributes:
        horizons: numbers of loops.
        seeds: of the trainings, at most three: each has a colour.
        shape: of the models; its number of loops is replaced.
        course: of the trainings.
        num_texts: in training and index.
        num_queries: Q.
        width: of the sketches.
        batch_size: examples in one forward and backward.
        made_up: sums in words do where GSM8K is not at hand.
    """

    horizons: tuple[int, ...]
    seeds: tuple[int, ...]
    shape: Shape
    course: Course
    num_texts: int
    num_queries: int
    width: int = 8192
    batch_size: int = 32
    made_up: bool = False


SETTINGS = {
    "tiny": Setting(
        horizons=(1, 3),
        seeds=(0, 1),
        shape=Shape(dim=16, head_dim=16, num_bytes=16),
        course=Course(num_steps=4, batch_size=8, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=2),
        num_texts=24,
        num_queries=3,
        width=256,
        made_up=True,
    ),
    "small": Setting(
        horizons=(2, 4, 8, 16),
        seeds=(0, 1, 2),
        shape=Shape(dim=64, num_bytes=64),
        course=Course(num_steps=1200, batch_size=4, learning_rate=5e-3, weight_decay=0.1, num_checkpoints=3),
        num_texts=768,
        num_queries=64,
    ),
    "full": Setting(
        horizons=(4, 8, 16, 32),
        seeds=(0, 1, 2),
        shape=Shape(dim=256, num_bytes=512),
        course=Course(num_steps=6000, batch_size=64, learning_rate=1e-3, weight_decay=0.1, num_checkpoints=8),
        num_texts=7473,
        num_queries=1319,
        batch_size=64,
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A mean over queries at each loop, with its interval at LEVEL; each [S]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What was seen of one model.

    Attributes:
        horizon: its number of loops.
        seed: of its training.
        loss: mean over queries after training, nats a byte.
        signed: shares.
        energy: shares.
        positive: [S], part of the queries whose signed share is above zero.
        sketch_error: [S], a query's standard error by sketching, of the signed share: mean over queries.
        silent: loops without a gradient.
        difference: of the sum over loops from TracIn, relative, the largest of the first query's proponents.
    """

    horizon: int
    seed: int
    loss: float
    signed: Curve
    energy: Curve
    positive: np.ndarray
    sketch_error: np.ndarray
    silent: tuple[int, ...]
    difference: float


def run(size: str, folder: Path, device: str, progress: bool) -> Findings:
    """Trains, builds and asks an index for each horizon and seed. Trainings and indices are kept in the folder."""
    from rich.progress import track

    setting = SETTINGS[size]
    source, rows, queries = texts(setting)
    models = [(horizon, seed) for seed in setting.seeds for horizon in setting.horizons]
    trained = []
    for horizon, seed in track(models, f"models of {source}", disable=not progress):
        subject = ByteSubject(source, setting.course, replace(setting.shape, num_steps=horizon), rows, queries)
        trained.append(trained_model(setting, subject, horizon, seed, folder / f"{horizon}-loops-seed-{seed}", device))
    return Findings(
        setting=setting,
        data=_table(setting, source, trained),
        figure=_draw(setting, source, trained),
        claims=_claims(setting, trained),
    )


def texts(setting: Setting) -> tuple[str, list[str], list[str]]:
    """Where the texts are from, those to train on, and those to ask with.

    Raises:
        FileNotFoundError: GSM8K is not where DATA_VARIABLE says, or it says nothing and made-up texts won't do.
    """
    count, asked = setting.num_texts, setting.num_queries
    if folder := gsm8k_folder():
        return "GSM8K", gsm8k_texts(folder, count), gsm8k_texts(folder, asked, "test")
    if not setting.made_up:
        raise FileNotFoundError(
            f"this experiment reads GSM8K, and {DATA_VARIABLE} is not set; {SOURCE}: save them as gsm8k_train.jsonl "
            f"and gsm8k_test.jsonl, and set {DATA_VARIABLE} to their folder"
        )
    made_up = synthetic_texts(count + asked)
    return "sums in words, made up", made_up[:count], made_up[count:]


def trained_model(
    setting: Setting, subject: ByteSubject, horizon: int, seed: int, folder: Path, device: str
) -> Trained:
    task = train_with_checkpoints(subject, subject.rows, seed, folder, device=device)
    config = SketchConfig(width=setting.width)
    index = build_index(
        task, folder / "body.index", config, batch_size=setting.batch_size, device=device, progress=False
    )
    sketches = ExampleSketcher(task, config, device=device).sketch(subject.queries).values.numpy()
    energies = step_energies(index, sketches)
    return Trained(
        horizon=horizon,
        seed=seed,
        loss=float(np.mean(task.record()["query_losses"])),
        signed=over_queries(energies.signed_shares),
        energy=over_queries(energies.shares),
        positive=(energies.signed_shares.values > 0).mean(0),
        sketch_error=energies.signed_shares.standard_errors.mean(0),
        silent=index.steps_without_gradient,
        difference=difference_from_tracin(index, sketches[0]),
    )


def over_queries(shares: Estimate) -> Curve:
    """The mean over queries with its interval.

    The interval is Student's over the queries. They share the training texts' sketches, so each query's standard error
    by sketching is added whole, as if it were the same error in all of them: the interval is rather too wide.

    Args:
        shares: [Q, S], at least two queries.
    """
    count, mean = len(shares.values), shares.values.mean(0)
    error = np.hypot(shares.values.std(0, ddof=1) / np.sqrt(count), shares.standard_errors.mean(0))
    half = t.ppf((1 + LEVEL) / 2, count - 1) * error
    return Curve(mean=mean, low=mean - half, high=mean + half)


def _table(setting: Setting, source: str, trained: Sequence[Trained]) -> pa.Table:
    """A row for each model and loop."""
    rows = [
        {
            "texts": source,
            "horizon": model.horizon,
            "seed": model.seed,
            "loop": loop + 1,
            "signed_share": model.signed.mean[loop],
            "low": model.signed.low[loop],
            "high": model.signed.high[loop],
            "energy_share": model.energy.mean[loop],
            "positive_queries": model.positive[loop],
            "sketch_standard_error": model.sketch_error[loop],
            "held_out_loss": model.loss,
            "num_queries": setting.num_queries,
        }
        for model in trained
        for loop in range(model.horizon)
    ]
    return pa.Table.from_pylist(rows)


def _claims(setting: Setting, trained: Sequence[Trained]) -> list[Claim]:
    silent = sorted({(model.horizon, *model.silent) for model in trained if model.silent})

    def seen(claim: str, say: Callable[[Trained], str]) -> Claim:
        """What is to say of each seed's model, by horizon."""
        found = [
            f"{horizon}: {' / '.join(say(model) for model in trained if model.horizon == horizon)}"
            for horizon in setting.horizons
        ]
        return Claim(claim=claim, paper=UNCHECKED, seen="; ".join(found), agrees=None)

    return [
        adds_up(max(model.difference for model in trained)),
        Claim(
            claim="backpropagation goes through the whole loop",
            paper=UNCHECKED,
            seen=f"horizons and their loops without a gradient: {silent}" if silent else "every loop has a gradient",
            agrees=False if silent else None,
        ),
        seen("the first loop's signed share, for each seed, by horizon", lambda model: _percent(model.signed, 0)),
        seen("the last loop's signed share", lambda model: _percent(model.signed, -1)),
        seen("the loops of the largest and the smallest signed share", lambda model: _extremes(model.signed)),
        seen("loops whose signed share's interval is above zero, and below", lambda model: _signs(model.signed)),
        seen("signed share left of the energy when signs cancel, over all loops, in the first, and in the last", _left),
        seen("the loops of the largest and the smallest energy share", lambda model: _extremes(model.energy)),
        seen("more loops predict held-out texts better: loss, nats a byte", lambda model: f"{model.loss:.3f}"),
    ]


def _percent(curve: Curve, loop: int) -> str:
    return f"{curve.mean[loop]:+.1%} ({curve.low[loop]:+.1%} to {curve.high[loop]:+.1%})"


def _extremes(curve: Curve) -> str:
    return f"{curve.mean.argmax() + 1} and {curve.mean.argmin() + 1}"


def _signs(curve: Curve) -> str:
    return f"{(curve.low > 0).sum()} and {(curve.high < 0).sum()}"


def _left(model: Trained) -> str:
    first, last = (model.signed.mean[loop] / model.energy.mean[loop] for loop in (0, -1))
    return f"{model.signed.mean.sum():.0%}, {first:.0%} and {last:.0%}"


def _draw(setting: Setting, source: str, trained: Sequence[Trained]) -> Figure:
    count = len(setting.horizons)
    figure: Any = Figure(figsize=(3 * count, 3.4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, horizon in zip(panels, setting.horizons, strict=True):
        models = [model for model in trained if model.horizon == horizon]
        loops = np.arange(1, horizon + 1)
        axes.axhline(0, color=GREY, linewidth=0.8)
        for model, colour in zip(models, COLOURS, strict=False):
            mean, low, high = (100 * each for each in (model.signed.mean, model.signed.low, model.signed.high))
            axes.fill_between(loops, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(loops, mean, color=colour, marker="o", markersize=3, label=f"signed, seed {model.seed}")
        energy = 100 * np.mean([model.energy.mean for model in models], axis=0)
        axes.plot(loops, energy, color=GREY, linestyle="--", linewidth=1, label="energy, mean of seeds")
        axes.set_xticks(loops[:: max(1, horizon // 8)])
        dress(axes, f"{horizon} loop{'s' * (horizon > 1)}", "loop", "")
    panels[0].set_ylabel("SDI share of the loop, %")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    title = f"{source}: mean over {setting.num_queries} held-out texts, {LEVEL:.0%} bands; each panel has its own scale"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure
