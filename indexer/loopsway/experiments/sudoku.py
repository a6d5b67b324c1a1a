"""Figure 2: Sudoku boards solved loop by loop, and where in the loop the training puzzles' influence is.

N puzzles, L loops, B bands of difficulty.

Puzzles that training never saw, in thirds from the easiest to the hardest for a solver, are answered with more loops
than in training. The small setting has 6 x 6 boards, the full one 9 x 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from loopsway.indexer import ExampleSketcher, Index, SketchConfig, build_index, step_energies
from loopsway.tasks.sudoku import SudokuTask
from loopsway.tasks.sudoku_puzzles import Puzzle
from loopsway.tasks.sudoku_training import Recipe, SudokuRun, are_solved, train

from .findings import BLUE, GREEN, GREY, ORANGE, UNCHECKED, Claim, Findings, dress

BANDS, COLOURS, MARKERS = ("easiest third", "middle third", "hardest third"), (BLUE, GREEN, ORANGE), "osD"
SEED = 0
NEARLY = 0.9  # of a band's best accuracy: the loops that it takes to get there are compared
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is trained and asked.

    Attributes:
        recipe: of the training.
        asked_loops: L.
        asked_puzzles: of each band, for influences; accuracy is that of all held-out ones.
        width: of the sketches.
        batch_size: examples in one forward and backward.
    """

    recipe: Recipe
    asked_loops: int = 24
    asked_puzzles: int = 48
    width: int = 8192
    batch_size: int = 64


HASTY = Recipe(box_columns=2, num_puzzles=60, num_steps=4, width=16, num_loops=3, batch_size=8)
LARGE = Recipe(box_rows=3, box_columns=3, num_puzzles=60_000, width=192, num_loops=16, batch_size=256, num_steps=20_000)
SETTINGS = {
    "tiny": Setting(recipe=HASTY, asked_loops=4, asked_puzzles=2, width=256),
    "small": Setting(recipe=Recipe()),
    "full": Setting(recipe=LARGE, asked_loops=48, asked_puzzles=200, batch_size=256),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """What was seen of the puzzles of a band.

    Attributes:
        name: one of BANDS.
        puzzles: all of it, held out.
        solved: bool [L, N], whether the whole board is right after each loop.
        energies: [n, L], of the puzzles whose influences were asked for.
    """

    name: str
    puzzles: Sequence[Puzzle]
    solved: np.ndarray
    energies: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        return self.solved.mean(1)

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the accuracy, at 95 % (Wilson 1927)."""
        n, z, share = self.solved.shape[1], 1.96, self.accuracy
        centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)

    def quartiles(self) -> np.ndarray:
        """Of the energy, [3, L]."""
        return np.quantile(self.energies, QUARTILES, axis=0)

    @property
    def loops_needed(self) -> int:
        """Until the accuracy is nearly the band's best."""
        return int((self.accuracy >= NEARLY * self.accuracy.max()).argmax()) + 1

    @property
    def centre(self) -> float:
        """The loop, from 1, around which a median puzzle's energy lies."""
        return float(np.median(self._shares @ np.arange(1, self.energies.shape[1] + 1)))

    def late_share(self, loops: int) -> float:
        """Of a median puzzle's energy, what lies after so many loops."""
        return float(np.median(self._shares[:, loops:].sum(1)))

    @property
    def _shares(self) -> np.ndarray:
        totals = self.energies.sum(1, keepdims=True)
        return self.energies / np.where(totals > 0, totals, 1)


def run(size: str, folder: Path, device: str, progress: bool) -> Findings:
    """Trains, builds an index, and asks it about held-out puzzles. Training and index are kept in the folder."""
    setting, run = SETTINGS[size], str(folder / "sudoku")
    training = _trained(run, setting, device, progress)
    config, asked = SketchConfig(width=setting.width), SudokuTask(run, setting.asked_loops)
    options: dict[str, Any] = {"batch_size": setting.batch_size, "device": device, "progress": progress}
    index = build_index(SudokuTask(run), folder / "sudoku.index", config, **options)
    sketcher, model = ExampleSketcher(asked, config, device=device), asked.model(asked.checkpoints()[-1])
    bands = []
    for name, puzzles in zip(BANDS, thirds(asked.held_out()), strict=True):
        every = max(1, len(puzzles) // setting.asked_puzzles)  # they are in order: the first would be the easiest
        sketches = sketcher.sketch(puzzles[::every][: setting.asked_puzzles]).values.numpy()
        solved = are_solved(model, puzzles, setting.asked_loops).numpy()
        energies = step_energies(index, sketches).energies.values
        bands.append(Band(name=name, puzzles=puzzles, solved=solved, energies=energies))
    return Findings(
        setting=setting,
        data=_table(bands),
        figure=_draw(setting, bands),
        claims=_claims(setting, training, index, bands),
    )


def thirds(puzzles: Sequence[Puzzle]) -> list[list[Puzzle]]:
    """The puzzles from the easiest to the hardest; of those equally hard at a cut, the order drawn decides."""
    ordered = sorted(puzzles, key=lambda puzzle: puzzle.difficulty)
    cuts = [len(ordered) * third // len(BANDS) for third in range(len(BANDS) + 1)]
    return [ordered[start:end] for start, end in pairwise(cuts)]


def _trained(run: str, setting: Setting, device: str, progress: bool) -> SudokuRun:
    try:
        found = SudokuRun.read(run)
    except (FileNotFoundError, ValueError):
        found = None
    if found is not None and found.recipe == setting.recipe and found.seed == SEED:
        return found
    return train(run, setting.recipe, seed=SEED, progress=progress, device=device)


def _table(bands: Sequence[Band]) -> pa.Table:
    """A row for each band and loop, of its accuracy and of its energy."""
    rows = []
    for band in bands:
        quartiles = band.quartiles()
        for loop, (value, low, high) in enumerate(zip(band.accuracy, *band.interval(), strict=True)):
            cells = {"difficulty": band.name, "loop": loop + 1}
            rows.append({**cells, "measure": "board accuracy", "value": value, "low": low, "high": high,
                         "num_puzzles": len(band.puzzles)})  # fmt: skip
            low, value, high = quartiles[:, loop]
            rows.append({**cells, "measure": "energy", "value": value, "low": low, "high": high,
                         "num_puzzles": len(band.energies)})  # fmt: skip
    return pa.Table.from_pylist(rows)


def _claims(setting: Setting, training: SudokuRun, index: Index, bands: Sequence[Band]) -> list[Claim]:
    board, trained = setting.recipe.board, setting.recipe.num_loops
    at = [f"{band.accuracy[trained - 1]:.1%} and {band.accuracy[-1]:.1%}" for band in bands]
    clues = [float(np.mean([puzzle.clues for puzzle in band.puzzles])) for band in bands]
    harder = [f"{band.name}: {band.loops_needed}" for band in bands]
    totals = [float(np.median(band.energies.sum(1))) for band in bands]
    late = [band.late_share(trained) for band in bands]
    return [
        Claim(
            claim="the puzzles have one solution each, and training never saw the asked ones' solutions",
            paper=UNCHECKED,
            seen=f"{board.side} x {board.side} boards, {index.num_examples} in training, "
            f"{sum(len(band.puzzles) for band in bands)} held out with every puzzle of their solutions; a search for "
            f"a second solution found none; mean clues by difficulty: {', '.join(f'{mean:.1f}' for mean in clues)}",
            agrees=None,
        ),
        Claim(
            claim="more loops than in training solve more boards",
            paper=UNCHECKED,
            seen=f"with {trained} loops, those of training, and {setting.asked_loops}, from easiest to hardest third: "
            f"{'; '.join(at)}",
            agrees=None,
        ),
        Claim(
            claim="harder boards take more loops",
            paper=UNCHECKED,
            seen=f"loops to {NEARLY:.0%} of a third's best accuracy: {', '.join(harder)}",
            agrees=None,
        ),
        Claim(
            claim="harder boards have more SDI energy",
            paper=UNCHECKED,
            seen=f"median over puzzles, summed over loops: {', '.join(f'{total:.3g}' for total in totals)}",
            agrees=None,
        ),
        Claim(
            claim="harder boards have their SDI energy later",
            paper=UNCHECKED,
            seen=f"median centre at loop {', '.join(f'{band.centre:.1f}' for band in bands)}; median share after the "
            f"loops of training: {', '.join(f'{share:.0%}' for share in late)}",
            agrees=None,
        ),
    ]


def _draw(setting: Setting, bands: Sequence[Band]) -> Figure:
    figure: Any = Figure(figsize=(9.5, 3.8), layout="constrained")
    accuracy, energy = figure.subplots(1, 2)
    loops, trained = np.arange(1, setting.asked_loops + 1), setting.recipe.num_loops
    for axes in (accuracy, energy):
        axes.axvline(trained + 0.5, color=GREY, linewidth=0.8, linestyle=":")
    for band, colour, marker in zip(bands, COLOURS, MARKERS, strict=True):
        style = {"color": colour, "marker": marker, "markersize": 4}
        low, median, high = band.quartiles()
        accuracy.fill_between(loops, *(100 * bound for bound in band.interval()), color=colour, alpha=0.15, linewidth=0)
        accuracy.plot(loops, 100 * band.accuracy, label=f"{band.name} (n = {len(band.puzzles)})", **style)
        energy.fill_between(loops, low, high, color=colour, alpha=0.15, linewidth=0)
        energy.plot(loops, median, label=f"{band.name} (n = {len(band.energies)})", **style)
    side = setting.recipe.board.side
    accuracy.set_ylim(0, 102)
    energy.set_yscale("log")
    dress(
        accuracy,
        f"Held-out {side} x {side} boards solved (95 % band)",
        "loops (dotted: end of training's)",
        "boards, %",
    )
    dress(energy, "SDI energy (median, quartiles)", "loop (dotted: end of training's)", "sum of |influence| (loss)")
    for axes, place in ((accuracy, "lower right"), (energy, "best")):
        axes.legend(frameon=False, fontsize=8, loc=place, title="difficulty", title_fontsize=8)
    return figure
