"""Time, memory and error on the paper's shape, ours beside the reference's, sketched and exact, as the model grows.

The shape is 2 blocks, then 4 that are applied 32 times, then 2, on 128 bytes. How it is measured, `scale_rows.py` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from loopsway.indexer.progress import BuildProgress
from loopsway.tasks.threads import one_thread

from .findings import BLUE, GREEN, GREY, ORANGE, PURPLE, UNCHECKED, Claim, Findings, dress
from .reference import DEFAULT_PROJECTION
from .scale_rows import EXACT, OURS, PLAIN, THEIRS, Row, Setting, measured_rows
from .texts import texts_at_hand
from .ways import Way

NUM_TEXTS = 256
ROUNDING = 1e-4  # relative, between two exact ways; the reference adds up in float32
LOW_ERROR = 0.1  # relative
LITTLE_MORE = 1.25  # of a plain step's peak
NOISE = 1.1  # of a time, from run to run
DEFAULTS = (OURS, THEIRS)
STYLES = {OURS: (BLUE, "o"), THEIRS: (ORANGE, "s"), EXACT: (GREEN, "D")}
KINDS = {
    "ours, 32 bits": ("ours", 32, BLUE, "o"),
    "ours, 1 bit": ("ours", 1, PURPLE, "v"),
    "reference, 32 bits": ("reference", 32, ORANGE, "s"),
}

SETTINGS = {
    "tiny": Setting(
        dims=(32,),
        num_steps=2,
        num_bytes=16,
        batch=2,
        training_steps=1,
        num_examples=4,
        num_draws=2,
        repeats=1,
        codes=((8192, 1),),
        projections=(16, DEFAULT_PROJECTION),
    ),
    "small": Setting(dims=(64, 128, 256), batch=2, training_steps=20, num_examples=8, num_draws=3),
    "full": Setting(dims=(256, 512, 768), batch=4, training_steps=100, num_examples=32, num_draws=10, repeats=7),
}


def run(size: str, folder: Path, device: str, progress: bool) -> Findings:
    """Trains each model a little and measures; nothing is kept in the folder."""
    setting = SETTINGS[size]
    texts, source = texts_at_hand(NUM_TEXTS)
    with one_thread(), BuildProgress(shown=progress) as bars:
        rows = [row for dim in setting.dims for row in measured_rows(setting, dim, texts, device, bars)]
    return Findings(
        setting=setting,
        data=pa.Table.from_pylist([{"texts": source, **row.cells()} for row in rows]),
        figure=_draw(setting, Measured(rows)),
        claims=_claims(setting, Measured(rows), source),
    )


class Measured:
    """Rows by dimension and way."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.dim, row.way): row for row in rows}
        self.dims = sorted({row.dim for row in rows})

    def of(self, way: Way, attribute: str) -> list[float]:
        """By dimension."""
        return [getattr(self._rows[dim, way], attribute) for dim in self.dims]

    def over(self, way: Way, other: Way, attribute: str) -> list[float]:
        return [a / b for a, b in zip(self.of(way, attribute), self.of(other, attribute), strict=True)]

    def peaks(self, way: Way, attribute: str = "peak_bytes") -> list[float]:
        """In a plain step's."""
        return [a / b for a, b in zip(self.of(way, attribute), self.of(PLAIN, "peak_bytes"), strict=True)]

    def matched(self, ours: Way, ways: Sequence[Way]) -> Way | None:
        """The reference's way with the fewest bytes that are no fewer than ours."""
        size = self.of(ours, "example_bytes")[0]
        enough = [way for way in ways if way.tool == "reference" and way.size and self._size(way) >= size]
        return min(enough, key=self._size, default=None)

    def _size(self, way: Way) -> float:
        return self.of(way, "example_bytes")[0]


def _claims(setting: Setting, measured: Measured, source: str) -> list[Claim]:
    at, is_tiny = f"at d = {_list(measured.dims, 0)}", setting is SETTINGS["tiny"]
    difference = max(measured.of(EXACT, "error"))
    errors = {way: measured.of(way, "error") for way in DEFAULTS}
    times = {way: measured.of(way, "time") for way in (*DEFAULTS, EXACT)}
    peaks = {way: measured.peaks(way) for way in (*DEFAULTS, EXACT)}
    default = {name: measured.over(OURS, THEIRS, name) for name in ("time", "peak_bytes", "example_bytes", "error")}
    return [
        Claim(
            claim="our exact influences are the reference's exact ones",
            paper="so by definition: both are SDI",
            seen=f"relative difference of at most {difference:.0e} {at}",
            agrees=difference < ROUNDING,
        ),
        Claim(
            claim="sketched influences match those of full gradients with low error",
            paper="SDI matches full-gradient baselines with low error (abstract)",
            seen=f"relative error {at}, each at its default: {_each(errors, 3)}; on {source}",
            agrees=None if is_tiny else max(map(max, errors.values())) < LOW_ERROR,
        ),
        Claim(
            claim="sketching holds little more than a plain step does, exact gradients several times as much",
            paper="a TensorSketch implementation that never materialises per-example gradients (abstract)",
            seen=f"peaks over model and batch, in those of a plain step, {at}: {_each(peaks, 2)}; ours, a model's "
            f"first batch: {_list(measured.peaks(OURS, 'first_peak_bytes'), 2)}",
            agrees=None if is_tiny else max(peaks[way][-1] for way in DEFAULTS) < LITTLE_MORE < peaks[EXACT][-1] / 2,
        ),
        Claim(
            claim="the larger the model, the less sketching adds to a plain step's time",
            paper="SDI scales excellently (abstract, without a number)",
            seen=f"time in plain steps {at}: {_each(times, 2)}",
            agrees=None if is_tiny else all(times[way][-1] < NOISE * times[way][0] for way in DEFAULTS),
        ),
        Claim(
            claim="ours over the reference's, each at its default",
            paper=UNCHECKED,
            seen=f"{at}: time {_list(default['time'], 2)}; peak {_list(default['peak_bytes'], 2)}; stored bytes "
            f"{_list(default['example_bytes'], 4)}; error {_list(default['error'], 2)}",
            agrees=None,
        ),
        Claim(
            claim="our error over the reference's, where it stores no fewer bytes of an example",
            paper=UNCHECKED,
            seen=f"{at}: {'; '.join(_matches(setting, measured))}",
            agrees=None,
        ),
    ]


def _matches(setting: Setting, measured: Measured) -> Iterator[str]:
    for width, bits in setting.codes:
        ours = Way(tool="ours", size=width, bits=bits)
        if (theirs := measured.matched(ours, setting.ways)) is not None:
            sizes = [f"{way} ({measured.of(way, 'example_bytes')[0]:,.0f} bytes)" for way in (ours, theirs)]
            yield f"{' and '.join(sizes)}: {_list(measured.over(ours, theirs, 'error'), 2)}"


def _each(values: dict[Way, list[float]], digits: int) -> str:
    return "; ".join(f"{way}: {_list(each, digits)}" for way, each in values.items())


def _list(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _draw(setting: Setting, measured: Measured) -> Figure:
    figure: Any = Figure(figsize=(11, 3.6), layout="constrained")
    time, memory, error = figure.subplots(1, 3)
    for axes, values in ((time, lambda way: measured.of(way, "time")), (memory, measured.peaks)):
        axes.axhline(1, color=GREY, linewidth=0.8)
        for way, (colour, marker) in STYLES.items():
            axes.plot(measured.dims, values(way), color=colour, marker=marker, markersize=5, label=str(way))
        axes.set(xscale="log", ylim=(0, None))
        axes.set_xticks(measured.dims, [str(dim) for dim in measured.dims])
        axes.minorticks_off()
    time.legend(frameon=False, fontsize=8)
    dress(time, "Time of a batch", "model dimension", "plain steps")
    dress(memory, "Peak memory, over the model", "model dimension", "a plain step's peaks")
    for label, (tool, bits, colour, marker) in KINDS.items():
        ways = [way for way in setting.ways if way.size is not None and (way.tool, way.bits) == (tool, bits)]
        for place in range(len(measured.dims)):
            sizes, errors = ([measured.of(way, name)[place] for way in ways] for name in ("example_bytes", "error"))
            style = {"color": colour, "marker": marker, "alpha": (1 + place) / len(measured.dims)}
            error.plot(
                sizes, errors, markersize=5, linewidth=1, label="" if place + 1 < len(measured.dims) else label, **style
            )
    error.set(xscale="log", yscale="log")
    error.legend(frameon=False, fontsize=8)
    dress(error, "Error (darkest: the largest model)", "bytes stored of an example", "relative error")
    return figure
