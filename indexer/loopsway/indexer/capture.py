"""Runs a model's forward and backward and hands every body module's per-example gradients to a sink, step by step.

A hook after each parameter-owning module's call notes the call's input and the step it belongs to; a hook on the
call's output receives the output's gradient in the backward pass and turns the pair into gradients at once, so that
activations are freed as the backward pass goes. Parameters need no gradient meanwhile.

This file knows no hashes: the sink does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import Loop
from .gradients import Rule, rule_of, supported
from .sketch import GradientSink

Losses = Callable[[nn.Module, Any], Tensor]
SinkFactory = Callable[[int, int], GradientSink]


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """What one run gave.

    Attributes:
        losses: [B], detached.
        sink: holding [B, S, ...].
        steps_without_gradient: steps that ran under no_grad or were cut off from the loss.
    """

    losses: Tensor
    sink: GradientSink
    steps_without_gradient: tuple[int, ...]


@dataclass
class _Run:
    """The state of one forward and backward."""

    marker: nn.Module | None
    in_forward: bool = True
    num_steps: int = 0
    with_gradient: set[int] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    sink: GradientSink | None = None
    batch: int = 0


@dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    name: str
    rule: Rule
    step: int
    inputs: Tensor
    version: int


class Capture:
    """The loop body of one model, ready to run.

    Args:
        model: any module; it is left as it was found after each run.
        loop: which modules are the body.

    Raises:
        ValueError: the body matches nothing, owns no trainable parameter, or owns one of an unsupported module.
    """

    def __init__(self, model: nn.Module, loop: Loop) -> None:
        self.model, self._loop = model, loop
        modules = dict(model.named_modules())
        self._roots = {name: modules[name] for name in _matches(modules, loop.body)}
        self._marker = _marker(modules, loop.marker)
        self._rules: dict[str, tuple[nn.Module, Rule]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, module in modules.items():
            if any(root == "" or name == root or name.startswith(root + ".") for root in self._roots):
                self._own(name, module)
        if not self.parameters:
            raise ValueError(f"loop body {list(loop.body)} owns no parameter that requires a gradient")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def run(self, losses: Losses, batch: Any, new_sink: SinkFactory) -> Captured:
        """One forward and backward.

        Args:
            losses: `losses(model, batch)` gives each example's own loss, [B].
            batch: for `losses`.
            new_sink: called with (B, S) between forward and backward.

        Raises:
            ValueError: what the losses or the model's calls break is named.
        """
        run = _Run(marker=self._marker)
        with _frozen(self.model), self._hooked(run), torch.enable_grad():
            values = losses(self.model, batch)
            run.in_forward = False
            _check_losses(values, run)
            self._check_calls(run)
            run.batch, run.sink = len(values), new_sink(len(values), run.num_steps)
            values.sum().backward()
        missing = tuple(sorted(set(range(run.num_steps)) - run.with_gradient))
        return Captured(losses=values.detach(), sink=run.sink, steps_without_gradient=missing)

    def _own(self, name: str, module: nn.Module) -> None:
        owned = {
            f"{name}.{key}" if name else key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        if not owned:
            return
        rule = rule_of(module)
        if rule is None:
            raise ValueError(
                f"loop body module {name!r} is a {type(module).__name__}, whose parameters ({', '.join(owned)}) can't "
                f"be attributed yet: supported are {supported()}; leave it out of Loop(body=...), or freeze it with "
                "requires_grad_(False)"
            )
        for key, parameter in owned.items():
            twin = next((other for other, known in self.parameters.items() if known is parameter), None)
            if twin is not None:
                raise ValueError(f"parameters {twin} and {key} are one tensor; shared weights in the body can't be "
                                 "attributed yet")  # fmt: skip
            self.parameters[key] = parameter
        self._rules[name] = (module, rule)

    @contextmanager
    def _hooked(self, run: _Run) -> Iterator[None]:
        handles = [
            root.register_forward_pre_hook(partial(self._enter, run), prepend=True) for root in self._step_modules()
        ]
        for name, (module, rule) in self._rules.items():
            hook = partial(self._note, run, name, rule)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _step_modules(self) -> list[nn.Module]:
        return [self._marker] if self._marker is not None else list(self._roots.values())

    def _enter(self, run: _Run, module: nn.Module, _args: Any) -> None:
        if run.marker is None:
            run.marker = module
        if module is run.marker:
            _refuse_recomputation(run)
            run.num_steps += 1

    def _note(
        self,
        run: _Run,
        name: str,
        rule: Rule,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Tensor | None:
        """After a call: remember its input, and ask for its output's gradient."""
        _refuse_recomputation(run)
        run.called.add(name)
        if run.num_steps == 0:
            raise ValueError(
                f"module {name!r} was called before any step began: the loop's marker is "
                f"{self._loop.marker or 'the first of ' + str(list(self._loop.body))}; name in Loop(body=...) the "
                "modules whose own forward is called"
            )
        if not torch.is_grad_enabled():
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        changed = None
        if not output.requires_grad:  # nothing before this call needs a gradient: begin the graph here
            anchor = torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
            output = changed = output + anchor
        call = _Call(module, name, rule, run.num_steps - 1, inputs.detach(), inputs._version)
        output.register_hook(partial(self._on_gradient, run, call))
        return changed

    def _on_gradient(self, run: _Run, call: _Call, output_gradients: Tensor) -> None:
        assert run.sink is not None
        if call.inputs.shape[0] != run.batch:
            raise ValueError(
                f"module {call.name!r} was called with an input of shape {tuple(call.inputs.shape)}, but the batch has "
                f"{run.batch} examples: its first dimension must be the batch (expand what all examples share)"
            )
        if call.inputs._version != call.version:
            raise ValueError(f"the input of module {call.name!r} was changed in place after the call; its gradient "
                             "is lost")  # fmt: skip
        run.with_gradient.add(call.step)
        with torch.no_grad():
            for key, gradient in call.rule(call.module, call.inputs, output_gradients).items():
                parameter = f"{call.name}.{key}" if call.name else key
                if parameter in self.parameters:
                    run.sink.add(parameter, call.step, gradient)

    def _check_calls(self, run: _Run) -> None:
        if run.num_steps == 0:
            raise ValueError(f"the loop's body {list(self._loop.body)} was never entered in the forward pass")
        idle = [name for name in self._rules if name not in run.called]
        if idle:
            raise ValueError(
                f"module {idle[0]!r} of the loop body was never called in the forward pass, so its parameters' "
                "gradients can't be seen; leave it out of Loop(body=...) or freeze it with requires_grad_(False)"
            )


def _refuse_recomputation(run: _Run) -> None:
    if not run.in_forward:
        raise ValueError(
            "the loop body was run again inside the backward pass: activation checkpointing can't be attributed yet; "
            "turn it off (for a Hugging Face model: model.gradient_checkpointing_disable())"
        )


def _matches(modules: dict[str, nn.Module], patterns: Any) -> list[str]:
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in modules if name == pattern or (name and fnmatchcase(name, pattern))]
        if not found:
            known = ", ".join(name for name in modules if name and name.count(".") < 2)
            raise ValueError(f"loop body {pattern!r} matches no module of the model; it has {known}")
        names.update(dict.fromkeys(found))
    return list(names)


def _marker(modules: dict[str, nn.Module], name: str | None) -> nn.Module | None:
    if name is not None and name not in modules:
        raise ValueError(f"loop marker {name!r} is no module of the model; it has {', '.join(filter(None, modules))}")
    return None if name is None else modules[name]


def _check_losses(values: Any, run: _Run) -> None:
    if not isinstance(values, Tensor) or values.dim() != 1:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"losses(model, batch) gave {shape}, expected one loss for each example: a tensor of [B]")
    if not values.isfinite().all():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"the losses of examples {bad[:8]} of the batch are not finite: {values[bad[:8]].tolist()}")
    if not values.requires_grad and run.num_steps:
        raise ValueError("the losses depend on no step of the loop: every step ran under no_grad or was detached")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient meanwhile, so that the backward pass computes only activations' gradients."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
