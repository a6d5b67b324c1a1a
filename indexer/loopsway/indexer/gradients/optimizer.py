"""Adam's scaling of gradients, for influences of an Adam step instead of a plain SGD step.

Both sides of an inner product are scaled by (sqrt(v) + epsilon)^(-1/2), v being Adam's second moment (Kingma and Ba
2015), so that it is <phi_n, phi_q / (sqrt(v) + epsilon)>: how an Adam step on the example changes the query's loss.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..config import SketchConfig


def optimizer_scales(
    parameters: Mapping[str, nn.Parameter], config: SketchConfig, second_moments: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Each parameter's factors, float32 of its shape and on its device; None for plain gradients.

    Raises:
        ValueError: second moments are missing, of another shape, negative or not finite.
    """
    if not config.optimizer_aware:
        return None
    if second_moments is None:
        raise ValueError("optimizer_aware=True needs Adam's second moments: second_moments={name: exp_avg_sq}")
    return {
        name: _scale(name, parameter, second_moments, config.optimizer_epsilon)
        for name, parameter in parameters.items()
    }


def _scale(name: str, parameter: nn.Parameter, second_moments: Mapping[str, Tensor], epsilon: float) -> Tensor:
    if name not in second_moments:
        raise ValueError(
            f"there is no second moment of {name!r}; there are those of {', '.join(list(second_moments)[:5])}, ..."
        )
    moment = second_moments[name]
    if moment.shape != parameter.shape:
        raise ValueError(
            f"the second moment of {name} has shape {tuple(moment.shape)}, the parameter has {tuple(parameter.shape)}"
        )
    if not moment.isfinite().all() or (moment < 0).any():
        raise ValueError(f"the second moment of {name} has entries that are negative or not finite")
    return (moment.detach().to(parameter.device).float().sqrt() + epsilon).rsqrt()
