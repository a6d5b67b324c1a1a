"""What bergson says of a training: a program that `peer.py` has another Python run, one that has bergson.

Of a module that is applied again and again bergson 2.5.1 keeps the latest input alone and drops it after one backward
call, so that the next ends with "'Linear' object has no attribute '_inputs'". Its loop is therefore unrolled here: each
application becomes a module of its own, with a copy of the weights. bergson then compares equal steps with each other,
as it compares each module with itself. It takes linear layers and convolutions, and no norms.

N examples, Q queries, S steps, P parameters of one copy.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Unrolled(nn.Module):
    """A copy of a module for each time that a forward pass calls it."""

    def __init__(self, module: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for _ in range(num_steps))
        self._num_calls = 0

    def forward(self, *inputs: Any) -> Any:
        step = self._num_calls % len(self.copies)
        self._num_calls += 1
        return self.copies[step](*inputs)


def unroll(model: nn.Module, body: Sequence[str], forward: Callable[[nn.Module], Any]) -> list[list[str]]:
    """Puts copies in the place of each module of the body, which all forward passes call equally often.

    Args:
        model: changed in place.
        body: names of modules.
        forward: a forward pass.

    Returns:
        The names of the copies' linear layers, for each step.
    """
    num_calls = dict.fromkeys(body, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            num_calls[name] += 1

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in body]
    with torch.no_grad():
        forward(model)
    for hook in hooks:
        hook.remove()
    (num_steps,) = set(num_calls.values())
    for name in body:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Unrolled(model.get_submodule(name), num_steps))
    places = [f"{name}.copies.{{}}" for name in body]
    return [
        [
            f"{place.format(step)}.{inner}"
            for place in places
            for inner, module in model.get_submodule(place.format(step)).named_modules()
            if isinstance(module, nn.Linear)
        ]
        for step in range(num_steps)
    ]


def gradients(losses: Callable[[nn.Module], Tensor], model: nn.Module, steps: list[list[str]], count: int) -> Tensor:
    """Each example's gradient by bergson, unprojected: [N, S, P] float64."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    for name, value in {"device": torch.device("cpu"), "dtype": torch.float32}.items():
        setattr(model, name, value)  # as transformers' models have them
    table = Dataset.from_dict({"input_ids": [[0, 0]] * count})  # it counts them; the losses are ours

    def forward_backward(model: nn.Module, *_: Any) -> Tensor:
        each = losses(model)
        each.sum().backward()
        model.zero_grad()
        return each

    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=str(Path(folder, "run")))
        config.partial_run_path.mkdir()
        collector = InMemoryCollector(
            model=model,
            data=table,
            cfg=config,
            processor=GradientProcessor(projection_dim=None, include_bias=True),
            target_modules={name for step in steps for name in step},
        )
        run = CollectorComputer(model, table, collector=collector, batches=[list(range(count))], cfg=config)
        run.forward_backward = forward_backward
        run.run_with_collector_hooks()
    each = [torch.cat([collector.gradients[name] for name in step], dim=1) for step in steps]
    return torch.stack(each, dim=1).double()


def main(request: Path) -> None:
    document = json.loads(request.read_bytes())
    sys.path += document["roots"]
    from loopsway.experiments.evaluation.predictions import BERGSON, BERGSON_ADDED, Predictions
    from loopsway.experiments.evaluation.subjects import make_subject

    subject = make_subject(document["subject"], tiny=document["tiny"])
    batches = {name: _batch(name, load_file(document["batches"])) for name in ("rows", "queries")}
    found = Predictions()
    for checkpoint in document["checkpoints"]:
        model = subject.new_model()
        model.load_state_dict(load_file(checkpoint["path"]))
        steps = unroll(model.eval(), document["body"], lambda model: subject.losses(model, batches["queries"]))
        rows, queries = (
            gradients(lambda model, batch=batch: subject.losses(model, batch), model, steps, _count(batch)).numpy()
            for batch in batches.values()
        )
        for method, mine, asked in (
            (BERGSON, rows, queries),
            (BERGSON_ADDED, rows.sum(1, keepdims=True), queries.sum(1, keepdims=True)),
        ):
            influences = np.einsum("qsp,nsp->qn", asked, mine) * checkpoint["learning_rate"]
            own = np.einsum("nsp,nsp->n", mine, mine) * checkpoint["learning_rate"]
            found.influences[method] = found.influences.get(method, 0) + influences
            found.self_influences[method] = found.self_influences.get(method, 0) + own
    found.write(Path(document["answer"]))


def _batch(name: str, parts: dict[str, Tensor]) -> Any:
    mine = [parts[key] for key in sorted(parts) if key.startswith(f"{name}.")]
    return tuple(mine) if len(mine) > 1 else mine[0]


def _count(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
