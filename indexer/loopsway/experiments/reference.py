"""The reference package, step-decomposed-influence 0.1.1 (Kaissis et al. 2026), on a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sdi import FullGradientTracInSDI, ProjectedTracInSDI
from sdi.estimators import FeatureSet
from torch import Tensor, nn

DEFAULT_PROJECTION = 2048  # floats for each parameter tensor, unless told otherwise


@contextmanager
def reference_features(
    losses: Callable[[nn.Module, Any], Tensor], model: nn.Module, body: str, projection: int | None, seed: int = 0
) -> Iterator[Callable[[Sequence[Any]], FeatureSet]]:
    """The reference's features of batches; at the end its hooks, which slow the model, are taken off.

    Args:
        losses: `losses(model, batch)` gives each example's own loss.
        model: gets the hooks.
        body: name of the module that is applied again and again.
        projection: floats for each parameter tensor; None: exact gradients.
        seed: of the hashes.
    """
    module = model.get_submodule(body)
    if projection is None:
        estimator = FullGradientTracInSDI(model=model, target_modules=module)
    else:
        estimator = ProjectedTracInSDI(model=model, target_modules=module, projection_size=projection, seed=seed)

    def features(batches: Sequence[Any]) -> FeatureSet:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            return estimator.featurize_loader(loader=batches, loss_fn=losses)

    try:
        yield features
    finally:
        estimator.close()  # else its hooks keep it, and its features, alive
