"""bergson's MAGIC of a training, a program that `peer.py` has another Python run, one that has bergson.

It repeats the training and differentiates each query's final loss through all of it, by the weight of each example in
the batches' means: what leaving an example out does to first order, optimizer and all. One backward pass through the
training for each query; nothing of it can be kept for the next.

N examples, Q queries, M steps of the optimizer, B examples a step.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EPSILON, UNDER_THE_ROOT = 1e-8, 1e-16  # the second keeps the derivative of the root of v finite where v is zero


class Weighted(nn.Module):
    """The mean of a batch's losses, by weight, as bergson's trainer asks for it."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self._losses = model, losses

    def forward(self, *, example_weight: Tensor, shift_loss_mask: Tensor, **parts: Tensor) -> Tensor:
        del shift_loss_mask  # the trainer counts it
        each = self._losses(self.model, batch_of(parts))
        return (example_weight * each).sum() / example_weight.sum()


class Batches:
    """The training's batches, with the weights of all examples; what bergson calls a data stream."""

    device = torch.device("cpu")

    def __init__(self, rows: dict[str, Tensor], order: Tensor) -> None:
        self._rows, self._order = rows, order
        self.weights = nn.Parameter(torch.ones(len(next(iter(rows.values())))))  # [N]

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = self._order[step]
        parts = {name: part[batch] for name, part in self._rows.items()}
        return {**parts, "example_weight": self.weights[batch], "shift_loss_mask": torch.ones(len(batch))}


def batch_of(parts: dict[str, Tensor]) -> Any:
    """A batch is a tensor or a tuple of them."""
    mine = [parts[name] for name in sorted(parts)]
    return tuple(mine) if len(mine) > 1 else mine[0]


def final_gradients(model: Weighted, state: Any, queries: Any, losses: Callable[[nn.Module, Any], Tensor]) -> list[Any]:
    """Of each query's loss after the training, by parameter."""
    from bergson.magic.swap import swap_parameters

    parameters = {name: each.detach().clone().requires_grad_() for name, each in state.params.items()}
    with swap_parameters(model, parameters, state.buffers, preserve_graph=True):
        each = losses(model.model, queries)
        found = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in each]
    return [dict(zip(parameters, gradients, strict=True)) for gradients in found]


def influences(model: Weighted, batches: Batches, queries: Any, training: dict[str, Any], folder: str) -> np.ndarray:
    """[Q, N], positive where more weight for the example lowers the query's loss."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    rates = torch.tensor(training["learning_rates"])
    optimizer = torchopt.adamw(
        lambda count: rates[count.long() if isinstance(count, Tensor) else count],
        betas=tuple(training["betas"]),
        eps=EPSILON,
        eps_root=UNDER_THE_ROOT,
        weight_decay=training["weight_decay"],
    )
    trainer, state = Trainer.initialize(model, optimizer)
    clip = {"max_grad_norm": training["clip_norm"]}
    final = trainer.train(state, batches, save_dir=folder, save_mode="sqrt", **clip).detach_()
    found = []
    for gradients in final_gradients(model, final, queries, model._losses):
        batches.requires_grad, batches.weights.grad = True, None
        leaves = torchopt.pytree.tree_leaves(final.opt_state)
        zeros = [torch.zeros_like(each) for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]
        start = BackwardState(gradients, zeros, torch.zeros_like(batches.weights))
        done = trainer.backward(folder, batches, start, final.to("cpu"), cleanup=False, save_mode="sqrt", **clip)
        found.append(-done.weight_grads.detach().double().numpy())
    return np.stack(found)


def main(request: Path) -> None:
    document = json.loads(request.read_bytes())
    sys.path += document["roots"]
    from loopsway.experiments.evaluation.predictions import MAGIC, Predictions
    from loopsway.experiments.evaluation.subjects import make_subject

    torch.set_num_threads(1)
    subject = make_subject(document["subject"], tiny=document["tiny"])
    parts, training = load_file(document["batches"]), document["training"]
    rows, queries = (
        {name.replace(".", "_"): part for name, part in parts.items() if name.startswith(f"{kind}.")}
        for kind in ("rows", "queries")
    )
    torch.manual_seed(training["seed"])
    model = Weighted(subject.new_model(), subject.losses)
    # The quick kernels of attention have no second derivative.
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
        batches = Batches(rows, torch.tensor(training["batches"]))
        found = Predictions(influences={MAGIC: influences(model, batches, batch_of(queries), training, folder)})
    found.write(Path(document["answer"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
