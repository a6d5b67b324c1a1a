"""How each parameter was attributed to and what it cost, as `StepSketcher.plan` and `loopsway inspect --plan` show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .planner import PathCost


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One parameter in one batch.

    Attributes:
        parameter: its name.
        shape: its shape.
        functions: what used it, such as `linear`.
        uses: how often, over all steps.
        owners: where the examples lie in those functions' outputs.
        path: how its gradient went into the sketch: product, fourier, rows, dense; empty for exact gradients.
        expected_ms: by the planner's constants, of the batch.
        measured_ms: of the batch; None on a GPU, which is not waited for.
        note: why the slow way was taken, or that the parameter was not used.
    """

    parameter: str
    shape: tuple[int, ...]
    functions: str = ""
    uses: int = 0
    owners: str = ""
    path: str = ""
    expected_ms: float | None = None
    measured_ms: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_entries(
    parameters: Mapping[str, tuple[int, ...]],
    seen: Mapping[str, Mapping[tuple[str, str], int]],
    costs: Mapping[str, PathCost],
    untied_because: str | None,
) -> list[PlanEntry]:
    """One entry for each parameter.

    Args:
        parameters: names and shapes.
        seen: how often each was used by which function, and the owners there.
        costs: of each, by the sink.
        untied_because: why the body was untied, if it was.
    """
    return [
        _entry(name, shape, seen.get(name, {}), costs.get(name), untied_because) for name, shape in parameters.items()
    ]


def _entry(
    name: str,
    shape: tuple[int, ...],
    seen: Mapping[tuple[str, str], int],
    cost: PathCost | None,
    untied_because: str | None,
) -> PlanEntry:
    if untied_because is not None:
        return PlanEntry(parameter=name, shape=shape, path="untied copies", note=untied_because)
    facts: dict[str, Any] = {}
    if cost is not None:
        facts = {
            "path": cost.path,
            "expected_ms": cost.expected_ns / 1e6,
            "measured_ms": None if cost.measured_s is None else cost.measured_s * 1e3,
        }
    return PlanEntry(
        parameter=name,
        shape=shape,
        functions=", ".join(dict.fromkeys(function for function, _ in seen)),
        uses=sum(seen.values()),
        owners=", ".join(dict.fromkeys(owners for _, owners in seen)),
        note="" if seen else "not used in any step that has a gradient",
        **facts,
    )
