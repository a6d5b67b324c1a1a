"""Runs a model's forward and backward and hands every parameter's per-example gradients to a sink, step by step.

`Uses` reports each call that brings a parameter and the batch together; a hook on the call's output receives the
output's gradient in the backward pass and turns it into the parameters' gradients at once, so that activations are
freed as the backward pass goes. Parameters need no gradient meanwhile. Where it is not known which entries belong to
which example, the backward pass runs again with weighted losses (`owners.py`): at a model's first batch, and behind
routers.

This file knows no hashes: the sink does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Loop
from ..gradients import backward
from ..gradients.body import Body
from ..gradients.derived import to_parameters
from ..gradients.forms import placed, scaled
from ..gradients.losses import Losses, check_losses, frozen
from ..gradients.owners import DIGIT, DIGIT_HALF, Axis, MixedExamplesError, Owners, digits_of, num_places, weights
from ..gradients.rules import Context, rule_for
from ..gradients.sites import Site, Sites
from ..gradients.steps import Moment, Steps
from ..gradients.uses import BROADCASTS, NotFollowedError, Use, Uses, anchor_of, is_differentiable
from .sketch import GradientSink

SinkFactory = Callable[[int, int], GradientSink]


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """What one run gave.

    Attributes:
        losses: [B], detached.
        values: the sink's, one for each example: [B, slots, W], or [B, slots, P] when exact. Slots are the steps, then
            `before` and `after` if they were asked for.
        sink: that they came from.
        num_steps: S.
        steps_without_gradient: steps that ran under no_grad or were cut off from the loss.
    """

    losses: Tensor
    values: Any
    sink: GradientSink
    num_steps: int
    steps_without_gradient: tuple[int, ...]


@dataclass(eq=False)
class _Trace:
    """What earlier passes told of one output: its plain gradient, and its entries' owners so far.

    Of the uses at one place only the first is traced, the others (plain=None) wait for what it tells.
    """

    plain: Tensor | None = None
    owner: Tensor | None = None


@dataclass(eq=False)
class _Run:
    """The state of one forward and its backward passes."""

    steps: Steps
    outside: bool
    sink: GradientSink | None = None
    batch: int = 0
    place: int | None = None  # of the digit that this backward pass tells; None in the plain pass
    digit: int = DIGIT
    traces: dict[int, _Trace] = field(default_factory=dict)
    traced_sites: set[Site] = field(default_factory=set)
    with_gradient: set[int] = field(default_factory=set)
    used_in_steps: bool = False
    may_trace: bool = False


@dataclass(eq=False)
class _Call:
    use: Use
    moment: Moment
    site: Site
    output: Tensor | None  # kept only while the site has to learn how the call is split


class _LearnedError(Exception):
    """Something was learned that changes how the batch has to be run: run it again."""


class Capture:
    """The loop body of one model, ready to run.

    Args:
        model: any module; it is left as it was found after each run.
        loop: which modules are the body.

    Attributes:
        used_autocast: whether any use so far was under autocast.
        seen: of the last run, how often each parameter was used by each function, with its entries' owners.

    Raises:
        ValueError: the body matches nothing or owns no trainable parameter.
    """

    def __init__(self, model: nn.Module, loop: Loop) -> None:
        self.model, self.body = model, Body(model, loop)
        self.parameters = self.body.parameters
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._sites = Sites()
        self.seen: dict[str, dict[tuple[str, str], int]] = {}
        self.used_autocast = False
        self._anchors = True  # until a run shows that no checkpoint needs its inputs to have gradients

    def run(self, losses: Losses, batch: Any, new_sink: SinkFactory, *, outside: bool | None = None) -> Captured:
        """One forward and backward.

        Args:
            losses: `losses(model, batch)` gives each example's own loss, [B].
            batch: for `losses`.
            new_sink: called with (B, number of slots) between forward and backward.
            outside: whether `before` and `after` are wanted; None: as the loop says.

        Raises:
            ValueError: what the losses or the model's calls break is named.
            NotFollowedError: a use of a parameter can't be told apart by example from the outside.
        """
        outside = self.body.loop.outside if outside is None else outside
        while True:
            try:
                return self._run_once(losses, batch, new_sink, outside)
            except _LearnedError:
                continue

    def _run_once(self, losses: Losses, batch: Any, new_sink: SinkFactory, outside: bool) -> Captured:
        steps = self.body.steps()
        run = _Run(steps, outside)
        self.seen = {}
        uses = Uses(
            self.parameters.values(),
            self.body.constants(),
            partial(self._on_use, run),
            lambda use: not self._sites.of(use).is_shared,
            anchors=self._anchors,
        )
        with frozen(self.model), steps.watched(), uses, torch.enable_grad():
            values = losses(self.model, batch)
            with torch._C.DisableTorchFunction():
                check_losses(values, steps.num_steps)
                self.body.check(steps, run.used_in_steps)
                run.batch = len(values)
                run.sink = new_sink(len(values), steps.num_steps + 2 * outside)
            self._backward(run, values)
        self._anchors = steps.has_recomputed
        missing = tuple(sorted(set(range(steps.num_steps)) - run.with_gradient))
        return Captured(
            losses=values.detach(),
            values=run.sink.values,
            sink=run.sink,
            num_steps=steps.num_steps,
            steps_without_gradient=missing,
        )

    def _backward(self, run: _Run, values: Tensor) -> None:
        """The plain pass, and those that tell owners if any are unknown."""
        run.steps.begin_backward()
        torch.autograd.backward(values.sum(), retain_graph=run.may_trace and run.batch > 1)
        if not run.traces:
            return
        places = num_places(run.batch, run.digit)
        for place in range(places):
            run.place = place
            run.steps.begin_backward()
            weighted = values * weights(run.batch, place, run.digit, values.device)
            torch.autograd.backward(weighted.sum(), retain_graph=place + 1 < places)

    def _on_use(self, run: _Run, use: Use, out: Any) -> Any:
        self.used_autocast |= use.autocast is not None
        site = self._sites.of(use)
        run.may_trace |= not site.is_known()
        moment = run.steps.note() if run.steps.in_forward else run.steps.recomputed()
        if moment is not None:
            run.used_in_steps |= moment.step >= 0
        if not torch.is_grad_enabled():
            return out
        if not any(each.requires_grad for each in backward.differentiable(out)):
            out = _anchored(use, out)
        if moment is None:  # recomputed only for what it saved: the gradients come to the first pass's outputs
            return out
        outputs = backward.differentiable(out)
        if not any(each.requires_grad for each in outputs):
            raise NotFollowedError(f"{use.name}() is called inside torch.vmap")
        call = _Call(use, moment, site, outputs[0].detach() if site.needs_output() else None)
        if len(outputs) == 1:
            outputs[0].register_hook(lambda gradient: self._on_gradients(run, call, [gradient]))
        else:
            wanted = [each for each in outputs if each.requires_grad]
            places = [at for at, each in enumerate(outputs) if each.requires_grad]
            torch.autograd.graph.register_multi_grad_hook(
                wanted, lambda found: self._on_gradients(run, call, _at(places, found, len(outputs)))
            )
        return out

    def _on_gradients(self, run: _Run, call: _Call, gradients: list[Tensor | None]) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            first = next((each for each in gradients if each is not None), None)
            slot = run.steps.slot(call.moment, outside=run.outside)
            if first is None or slot is None or not first.numel():
                return
            if slot < run.steps.num_steps:
                run.with_gradient.add(slot)
            device = first.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                try:
                    owners = self._owners(run, call, first)
                except MixedExamplesError as error:
                    raise self._mixed(call) from error
                if owners is not None:
                    self._add(run, call, slot, gradients, owners)

    def _owners(self, run: _Run, call: _Call, gradient: Tensor) -> Owners | None:
        """Whose the output's entries are; None while that is being traced, or once the call is done."""
        if run.place is None:
            owners = call.site.owners(call.use, run.batch)
            if owners is None:
                self._begin_trace(run, call, gradient)
            return owners
        trace = run.traces.get(call.moment.clock)
        if trace is None:
            return None
        is_last = run.digit ** (run.place + 1) >= run.batch
        if trace.plain is None:
            return self._as_traced(run, call) if is_last else None
        digits = digits_of(trace.plain, _real(gradient), run.digit)
        part = torch.where(digits >= 0, digits * run.digit**run.place, -1)
        trace.owner = part if trace.owner is None else torch.where(part >= 0, trace.owner + part, -1)
        return call.site.learn(trace.owner, run.batch) if is_last else None

    def _begin_trace(self, run: _Run, call: _Call, gradient: Tensor) -> None:
        if not run.may_trace:  # another shape than what was learned: trace it after all
            call.site.axes = []
            raise _LearnedError
        if gradient.dtype == torch.float16:
            run.digit = DIGIT_HALF
        waits = call.site in run.traced_sites and not (call.site.is_moved or call.site.traces_all)
        run.traces[call.moment.clock] = _Trace(None if waits else _real(gradient).clone())
        run.traced_sites.add(call.site)

    def _as_traced(self, run: _Run, call: _Call) -> Owners:
        """As the first use at the same place, if that told one arrangement; or else each use has to be traced."""
        owners = call.site.owners(call.use, run.batch)
        if owners is None:
            call.site.traces_all = True
            raise _LearnedError
        return owners

    def _add(self, run: _Run, call: _Call, slot: int, gradients: list[Tensor | None], owners: Owners) -> None:
        use, batch = call.use, run.batch
        scale = None
        if run.place is not None:
            scale = 1 / weights(batch, run.place, run.digit, self.body.device)
        found = None
        if len(gradients) == 1:
            assert gradients[0] is not None
            found = rule_for(Context(use, gradients[0], owners, batch))
        call.site.has_rule = found is not None
        if found is None:
            found = self._without_rule(call, gradients, owners, batch)
        assert run.sink is not None
        for source, its_gradient in found:
            for parameter, gradient in to_parameters(source, its_gradient):
                name = self._names[id(parameter)]
                for part in placed(gradient, parameter.dim()):
                    run.sink.add(name, slot, part if scale is None else scaled(part, scale))
                counts = self.seen.setdefault(name, {})
                key = (use.name, str(owners))
                counts[key] = counts.get(key, 0) + 1
        use.leaves, call.output = None, None

    def _without_rule(self, call: _Call, gradients: list[Tensor | None], owners: Owners, batch: int) -> Any:
        if not isinstance(owners, Axis):
            raise NotFollowedError(f"{call.use.name}() is used on rows in any order, and there is no rule for it")
        split = call.site.split
        if split is None:
            if call.output is None:  # a rule took this place's uses so far: keep their outputs from now on
                call.site.has_rule = False
                raise _LearnedError
            split = backward.split_of(call.use, call.output, owners, batch)
            if batch > 1:
                call.site.split = split
        return backward.gradients(call.use, split, gradients, owners, batch)

    def _mixed(self, call: _Call) -> Exception:
        if call.use.name in BROADCASTS and not call.site.is_shared:
            call.site.is_shared = True
            return _LearnedError()
        roots = [self._names[id(root)] for source in call.use.sources.values() for root in source.roots()]
        return ValueError(
            f"one example's loss depends on another's: the gradient at {call.use.name}() with {', '.join(roots)} mixes "
            "examples. Each entry of losses(model, batch) must depend on its own example alone (no batch norm in "
            "training mode, no load balancing over the batch, no contrast between examples)"
        )


def _anchored(use: Use, out: Any) -> Any:
    """Nothing before this call needs a gradient: begin the graph here."""
    outputs = backward.differentiable(out)
    anchor = anchor_of(outputs[0])
    if isinstance(out, Tensor):
        return out.add_(anchor) if use.name.endswith("_") else out + anchor
    changed = [each + anchor if is_differentiable(each) else each for each in out]
    return tuple(changed) if type(out) is tuple else changed if type(out) is list else type(out)(changed)


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values


def _at(places: list[int], found: Any, size: int) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * size
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return gradients
