"""Adam's second moments from the `optimizer.pt` that the Hugging Face Trainer writes beside a checkpoint's weights.

The file names no parameters: it numbers them, first those with weight decay and then those without, each in the model's
order. Which are which is asked of the Trainer itself.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopsway.indexer.task import TaskError

from .causal_lm_models import extra

OPTIMIZER = "optimizer.pt"
SECOND_MOMENT = "exp_avg_sq"


def read_second_moments(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """The second moments by parameter name, float32; parameters that never had a gradient in training have none.

    They are v / (1 - beta2^t), as Adam divides by them: early in training v itself is still near its start at zero.

    Args:
        file: as the Trainer wrote it.
        model: with the parameters that were trained requiring gradients; its weights may be on the meta device.

    Raises:
        TaskError: the file is damaged, of another optimizer, or of another model.
    """
    groups, decays, state = _read(file)
    names = _names_in_order(model)
    if [len(group) for group in groups] != [len(group) for group in names]:
        raise TaskError(
            f"{file} keeps parameters in groups of {[len(group) for group in groups]}, but the Trainer would group "
            f"this model's into {[len(group) for group in names]} (with weight decay, without): it is of another "
            "model, of another optimizer, or of other trainable parameters"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for group, in_order, decay in zip(groups, names, decays, strict=True):
        for number, name in zip(group, in_order, strict=True):
            if number in state:
                moment = _moment(state[number], name, shapes[name], file)
                moments[name] = moment / (1 - decay ** float(state[number]["step"]))
    return moments


def _read(file: Path) -> tuple[list[list[Any]], list[float], dict[Any, Any]]:
    """The numbers of each group's parameters, each group's beta2, and the state by number."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        groups = saved["param_groups"]
        decays = [float(group.get("betas", (0.9, 0.999))[1]) for group in groups]
        return [list(group["params"]) for group in groups], decays, dict(saved["state"])
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise TaskError(f"{file} can't be read as an optimizer's state ({type(error).__name__}: {error})") from error


def _names_in_order(model: nn.Module) -> list[list[str]]:
    with extra("transformers"):
        from transformers import Trainer

    unbound: Any = Trainer.get_decay_parameter_names  # it looks at the model alone
    with_decay = set(unbound(None, model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[name for name in trained if (name in with_decay) is decays] for decays in (True, False)]


def _moment(kept: Any, name: str, shape: tuple[int, ...], file: Path) -> Tensor:
    moment = kept.get(SECOND_MOMENT) if isinstance(kept, dict) else None
    if not isinstance(moment, Tensor):
        raise TaskError(
            f"{file} keeps no {SECOND_MOMENT} for {name}: optimizer-aware influence needs training with Adam or AdamW "
            "in full precision"
        )
    if tuple(moment.shape) != shape:
        raise TaskError(
            f"{file} keeps a second moment of shape {tuple(moment.shape)} where {name} has {shape}: it is of another "
            "model, or its parameters were in another order"
        )
    return moment.to(torch.float32, copy=True)  # the file stays mapped, and training may go on to replace it
