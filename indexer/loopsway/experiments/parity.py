"""Figure 1: what a looped transformer does, loop by loop, with an alternating bit string that training never saw.

N training strings, L loops, D the model's width.

The model of `loopsway.tasks.parity` answers with more loops than it was trained with: at each, its margin at the answer
token, the influence of the training set (SDI), and the answer token's hidden state. The plane is that of the two
principal components of all held-out strings' states; k-means groups the probe's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from scipy.cluster.vq import kmeans2

from loopsway.indexer import ExampleSketcher, Index, SketchConfig, build_index, step_energies
from loopsway.tasks.parity import ParityTask
from loopsway.tasks.parity_model import ParityTransformer
from loopsway.tasks.parity_strings import encode, held_out_strings, parity
from loopsway.tasks.parity_training import Recipe, is_trained, train

from .findings import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    UNCHECKED,
    Claim,
    Findings,
    adds_up,
    difference_from_tracin,
    dress,
)
from .period import period

STATES = 4
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
SEED = 0
STILL = 0.05  # a state that moves by less than this of its own size in a loop has settled


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is trained and asked.

    Attributes:
        max_length: of the strings; the probe has this length.
        trained_loops: of the model.
        asked_loops: L.
        width: of the sketches.
        batch_size: examples in one forward and backward.
        is_learned: False stops training long before parity is: for tests.
    """

    max_length: int
    trained_loops: int
    asked_loops: int
    width: int
    batch_size: int = 64
    is_learned: bool = True


SETTINGS = {
    "tiny": Setting(max_length=6, trained_loops=7, asked_loops=14, width=256, is_learned=False),
    "small": Setting(max_length=10, trained_loops=11, asked_loops=33, width=8192),
    "full": Setting(max_length=14, trained_loops=15, asked_loops=60, width=8192, batch_size=512),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed:
    """What was seen of the probe at each loop.

    Attributes:
        margins: [L], the right answer's logit less the other's, read out after that loop.
        energies: [L], sum over training strings of |influence|.
        signed_sums: [L], sum of influences.
        errors: [L], the signed sums' standard errors.
        states: [L, D], at the answer token.
    """

    margins: np.ndarray
    energies: np.ndarray
    signed_sums: np.ndarray
    errors: np.ndarray
    states: np.ndarray


class LongParityTask(ParityTask):
    """The same task, answered with another number of loops."""

    def __init__(self, run: str, num_loops: int) -> None:
        super().__init__(run)
        self._num_loops = num_loops

    def model(self, checkpoint: Any) -> torch.nn.Module:
        model = super().model(checkpoint)
        assert isinstance(model, ParityTransformer)
        model.num_loops = self._num_loops
        return model


def run(size: str, folder: Path, device: str, progress: bool) -> Findings:
    """Trains, builds an index, and asks it about the probe. Training and index are kept in the folder."""
    setting, run = SETTINGS[size], folder / "parity"
    if not is_trained(run):
        train(run, seed=SEED, progress=progress, recipe=recipe(setting))
    task, config = ParityTask(str(run)), SketchConfig(width=setting.width)
    options = {"batch_size": setting.batch_size, "device": device, "progress": progress}
    index = build_index(task, folder / "parity.index", config, **options)
    probe = ("01" * setting.max_length)[: setting.max_length]
    asked = LongParityTask(str(run), setting.asked_loops)
    sketches = ExampleSketcher(asked, config, device=device).sketch([probe]).values.numpy()
    states, logits = loop_states(asked, [probe])
    strings = held_out_strings(setting.max_length)
    cloud = loop_states(asked, strings)[0].reshape(-1, states.shape[-1])
    energies, right = step_energies(index, sketches), parity(probe)
    probed = Probed(
        margins=logits[0, :, right] - logits[0, :, 1 - right],
        energies=energies.energies.values[0],
        signed_sums=energies.signed_sums.values[0],
        errors=energies.signed_sums.standard_errors[0],
        states=states[0],
    )
    portrait = Portrait(cloud, probed.states)
    return Findings(
        setting=setting,
        data=_table(probe, probed, portrait),
        figure=_draw(probe, probed, portrait, setting.trained_loops),
        claims=_claims(setting, probed, portrait, index, sketches),
    )


@torch.no_grad()
def loop_states(task: ParityTask, strings: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The answer token's hidden states after each loop, [N, L, D], and the logits read out of them, [N, L, 2]."""
    model = task.model(task.checkpoints()[-1])
    assert isinstance(model, ParityTransformer)
    states: list[torch.Tensor] = []
    handle = model.block.register_forward_hook(lambda module, inputs, output: states.append(output[:, 0]))
    model(encode(strings))
    handle.remove()
    stacked = torch.stack(states, dim=1)
    return stacked.numpy(), model.readout(model.norm(stacked)).numpy()


class Portrait:
    """The hidden states in the plane of their two principal components, in groups.

    Attributes:
        cloud: [N L, 2], of all strings.
        path: [L, 2], of the probe.
        groups: [L], k-means states of the probe.
        explained: share of the cloud's variance that the plane has.
    """

    def __init__(self, cloud: np.ndarray, path: np.ndarray) -> None:
        mean = cloud.mean(0)
        _, sizes, axes = np.linalg.svd(cloud - mean, full_matrices=False)
        self.cloud, self.path = (cloud - mean) @ axes[:2].T, (path - mean) @ axes[:2].T
        self.explained = float((sizes[:2] ** 2).sum() / (sizes**2).sum())
        _, self.groups = kmeans2(path, STATES, minit="++", rng=SEED)


def recipe(setting: Setting) -> Recipe:
    """How the parity model is trained."""
    sizes = {"max_length": setting.max_length, "num_loops": setting.trained_loops}
    if setting.is_learned:
        return Recipe(**sizes)
    return Recipe(**sizes, advance_accuracy=0.0, cooldown_accuracy=0.0, target_accuracy=0.0, cooldown_steps=5)


def _table(probe: str, probed: Probed, portrait: Portrait) -> pa.Table:
    return pa.table(
        {
            "probe": [probe] * len(probed.margins),
            "loop": np.arange(1, len(probed.margins) + 1),
            "logit_margin": probed.margins,
            "energy": probed.energies,
            "signed_sum": probed.signed_sums,
            "signed_sum_standard_error": probed.errors,
            "component_1": portrait.path[:, 0],
            "component_2": portrait.path[:, 1],
            "state": portrait.groups,
        }
    )


def _claims(setting: Setting, probed: Probed, portrait: Portrait, index: Index, sketches: np.ndarray) -> list[Claim]:
    moved = np.linalg.norm(np.diff(probed.states, axis=0), axis=1) / np.linalg.norm(probed.states[1:], axis=1)
    settles = np.flatnonzero(moved >= STILL)[-1] + 2 if (moved >= STILL).any() else 1  # a loop, counted from 1
    found = {
        "hidden state": period(probed.states),
        "logit margin": period(probed.margins[:, None]),
        "SDI": period(probed.signed_sums[:, None]),
    }
    settled = f" from loop {settles} on it moves by less than {STILL:.0%} a loop" if settles < len(moved) else ""
    periods = "; ".join(f"{name}: {'no period' if p is None else f'period {p}'}" for name, p in found.items())
    groups = " ".join(map(str, portrait.groups))
    trained = slice(0, setting.trained_loops)
    share = probed.energies[trained].sum() / probed.energies.sum()
    return [
        adds_up(difference_from_tracin(index, sketches[0])),
        Claim(
            claim="the answer to the alternating probe is periodic over loops",
            paper=UNCHECKED,
            seen=f"{periods};{settled or ' the state does not settle'}",
            agrees=None,
        ),
        Claim(
            claim="the answer token's hidden state passes through few states",
            paper=UNCHECKED,
            seen=f"of {STATES} k-means states, loop by loop: {groups}; "
            f"two components hold {portrait.explained:.0%} of the variance",
            agrees=None,
        ),
        Claim(
            claim="the probe, which training never saw, is answered right with the loops of training, and with more",
            paper=UNCHECKED,
            seen=f"margin {probed.margins[setting.trained_loops - 1]:+.1f} after {setting.trained_loops} loops, "
            f"{probed.margins[-1]:+.1f} after {len(probed.margins)}",
            agrees=None,
        ),
        Claim(
            claim="where the influence is: the share of SDI energy in the loops of training",
            paper=UNCHECKED,
            seen=f"{share:.0%} in the first {setting.trained_loops} of {len(probed.energies)} loops; the largest at "
            f"loop {probed.energies.argmax() + 1}",
            agrees=None,
        ),
    ]


def _draw(probe: str, probed: Probed, portrait: Portrait, trained: int) -> Figure:
    figure: Any = Figure(figsize=(11, 3.6), layout="constrained")
    margin, influence, plane = figure.subplots(1, 3)
    loops = np.arange(1, len(probed.margins) + 1)
    for axes in (margin, influence):
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(trained + 0.5, color=GREY, linewidth=0.8, linestyle=":")
    margin.plot(loops, probed.margins, color=BLUE, marker="o", markersize=3)
    dress(margin, f"Margin on {probe}", "loop iteration", "logit, right less wrong")
    low, high = probed.signed_sums - 2 * probed.errors, probed.signed_sums + 2 * probed.errors
    influence.fill_between(loops, low, high, color=ORANGE, alpha=0.2, linewidth=0)
    influence.plot(loops, probed.signed_sums, color=ORANGE, marker="o", markersize=3, label="signed sum (±2 s.e.)")
    influence.plot(loops, probed.energies, color=BLUE, marker="s", markersize=3, label="energy, sum of |SDI|")
    influence.legend(frameon=False, fontsize=8)
    dress(influence, "SDI of all training strings", "loop iteration (dotted: loops of training)", "influence (loss)")
    plane.scatter(*portrait.cloud.T, s=2, color="#d9d9d9", linewidth=0, rasterized=True)
    plane.plot(*portrait.path.T, color=GREY, linewidth=0.8)
    for group in range(STATES):
        at = portrait.path[portrait.groups == group]
        if len(at):
            plane.scatter(*at.T, s=18, color=COLOURS[group], zorder=3, label=f"state {group}")
    plane.annotate("loop 1", portrait.path[0], fontsize=8, xytext=(4, 4), textcoords="offset points")
    plane.annotate(f"loop {len(loops)}", portrait.path[-1], fontsize=8, xytext=(4, 4), textcoords="offset points")
    plane.legend(frameon=False, fontsize=8)
    dress(plane, "Answer token's hidden state", "component 1", "component 2")
    return figure
