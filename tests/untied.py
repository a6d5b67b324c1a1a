"""The general oracle: every step has its own copy of every parameter, whatever the model does with them.

B examples, S steps, P entries of all attributed parameters.

It is dumb on purpose and knows no rules. One example runs at a time, on a float64 copy of the model; at each entry to
the marker every parameter is replaced by a fresh leaf, in all the places that hold it; the example's gradient with
respect to the leaves of one step is that step's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from loopsway.indexer import Loop, SketchConfig
from loopsway.indexer.gradients.forms import Dense
from loopsway.indexer.sketches.device_hash import DeviceHash
from loopsway.indexer.sketches.sketch import Sketches

Losses = Callable[[nn.Module, Any], Tensor]
Leaves = dict[str, nn.Parameter]


def untied_gradients(
    model: nn.Module, loop: Loop, losses: Losses, batch: Any, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[str]]:
    """Each example's gradient with respect to each step's own parameters, and the parameters' names.

    Args:
        model: is left alone.
        loop: with `outside`, rows S and S + 1 are of the uses before the first step and after the last.
        losses: `losses(model, batch)`.
        batch: a tensor, or a dict or tuple of them, examples first.
        dtype: of the copy; float32 where the model can't be run in float64.

    Returns:
        [B, S, P] or [B, S + 2, P]; P in the order of the names, which is that of `model.named_modules()`.
    """
    untied = _Untied(copy.deepcopy(model).to(dtype), loop)
    with _Widened() if dtype == torch.float64 else nullcontext():
        rows = [untied.gradients(losses, example) for example in _examples(batch)]
    return torch.stack(rows), list(untied.originals)


def sketch_of(gradients: Tensor, shapes: Mapping[str, tuple[int, ...]], config: SketchConfig) -> Tensor:
    """What an engine must give in place of exact gradients [B, S, P]: every parameter's entries, added one by one."""
    assert config.width is not None
    hashes = DeviceHash.of_parameters(
        shapes, width=config.width, seed=config.seed, checkpoint="single", device=torch.device("cpu")
    )
    batch, num_slots, _ = gradients.shape
    sink = Sketches(
        hashes, batch, num_slots, width=config.width, layer_path=config.layer_path, device=torch.device("cpu")
    )
    parts = gradients.float().split([torch.Size(shape).numel() for shape in shapes.values()], dim=2)
    for name, part in zip(shapes, parts, strict=True):
        for slot in range(num_slots):
            sink.add(name, slot, Dense(part[:, slot].contiguous()))
    return sink.values


class _Widened(TorchFunctionMode):
    """float32 means float64: models that cast (`x.float()`, `softmax(dtype=torch.float32)`) do it in float64 too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        out = func(*args, **kwargs)
        made = isinstance(out, Tensor) and out.dtype == torch.float32
        return out.double() if made and not any(isinstance(each, Tensor) for each in args) else out


def _examples(batch: Any) -> Iterator[Any]:
    """Batches of one, padded as they were."""
    match batch:
        case Tensor():
            yield from batch.split(1)
        case dict():
            for parts in zip(*(value.split(1) for value in batch.values()), strict=True):
                yield dict(zip(batch, parts, strict=True))
        case _:
            yield from zip(*(value.split(1) for value in batch), strict=True)


@dataclass
class _Run:
    """One forward pass: the leaves of before, of each step and of after, in that order."""

    leaves: list[Leaves] = field(default_factory=list)
    marker: nn.Module | None = None
    exits: int = 0


class _Untied:
    """A model whose parameters are replaced as it runs."""

    def __init__(self, model: nn.Module, loop: Loop) -> None:
        self._model, self._outside = model, loop.outside
        modules = dict(model.named_modules())
        matched = [n for n in modules if any(n == p or (n and fnmatchcase(n, p)) for p in loop.body)]
        self._roots = [modules[name] for name in matched]
        self._marker = modules[loop.marker] if loop.marker else None
        body = {id(p) for root in self._roots for p in root.parameters()}
        self.originals: dict[str, Tensor] = {}
        self._homes: dict[str, list[tuple[nn.Module, str]]] = {}  # all the places that hold a parameter
        names: dict[int, str] = {}
        for path, module in modules.items():
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or not (loop.outside or id(parameter) in body):
                    continue
                name = names.setdefault(id(parameter), f"{path}.{key}" if path else key)
                self.originals[name] = parameter.detach().clone()
                self._homes.setdefault(name, []).append((module, key))

    def gradients(self, losses: Losses, example: Any) -> Tensor:
        """[S, P], or [S + 2, P] with what was used outside the loop."""
        with self._run() as dry, torch.no_grad():
            losses(self._model, example)
        with self._run(last_exit=dry.exits) as run:
            loss = losses(self._model, example)
            assert loss.shape == (1,)
        flat = [leaf for leaves in run.leaves for leaf in leaves.values()]
        found = torch.autograd.grad(loss.sum(), flat, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(flat, found, strict=True)]
        slots = torch.cat([part.flatten() for part in parts]).unflatten(0, (len(run.leaves), -1))
        return torch.cat([slots[1:-1], slots[:1], slots[-1:]]) if self._outside else slots[1:-1]

    @contextmanager
    def _run(self, last_exit: int | None = None) -> Iterator[_Run]:
        run = _Run(marker=self._marker)
        self._replace(run)

        def enter(module: nn.Module, _args: Any) -> None:
            run.marker = module if run.marker is None else run.marker
            if module is run.marker:
                self._replace(run)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            run.exits += 1
            if run.exits == last_exit:
                self._replace(run)

        entered = self._roots if self._marker is None else [self._marker]
        handles = [module.register_forward_pre_hook(enter, prepend=True) for module in entered]
        handles += [module.register_forward_hook(leave) for module in self._roots]
        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()

    def _replace(self, run: _Run) -> None:
        """Fresh leaves, by assignment: a module that keeps lists of its parameters (nn.GRU) is told so."""
        fresh = {name: nn.Parameter(value.clone()) for name, value in self.originals.items()}
        run.leaves.append(fresh)
        for name, leaf in fresh.items():
            for module, key in self._homes[name]:
                setattr(module, key, leaf)
