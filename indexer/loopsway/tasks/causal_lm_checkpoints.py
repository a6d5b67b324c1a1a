"""Checkpoints of a Hugging Face model on disk: which folders, in which order, at which learning rates.

Knows the layout that `save_pretrained` and the Trainer write, and nothing of how weights are loaded.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopsway.indexer.config import Checkpoint
from loopsway.indexer.task import TaskError

WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG, TRAINER_STATE = "adapter_config.json", "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

_log = logging.getLogger(__name__)


def find_folders(model: str | Sequence[str]) -> list[Path]:
    """The folders of all checkpoints, in training order.

    Args:
        model: folders, separated by commas where it is one string. One with `checkpoint-*` subfolders, as the Trainer
            writes, stands for all of them in the order of their steps.

    Raises:
        TaskError: a folder is missing, holds no safetensors weights, or is named twice.
    """
    parts = model.split(",") if isinstance(model, str) else model
    named = [Path(part.strip()) for part in parts if part.strip()]
    if not named:
        raise TaskError("no model folder was named; give model='path/to/folder' (--hf on the command line)")
    folders = [folder for name in named for folder in (_trained(name) or [name])]
    for folder in folders:
        _check(folder)
    if len(set(folders)) < len(folders):
        raise TaskError(f"a model folder is named twice: {', '.join(map(str, folders))}")
    return folders


def find_checkpoints(folders: Sequence[Path], learning_rate: float | str | Sequence[float] | None) -> list[Checkpoint]:
    """The checkpoints in these folders.

    Args:
        folders: from `find_folders`.
        learning_rate: one for all of them, or one for each (in one string: separated by commas). None: what the Trainer
            recorded beside the weights, else 1, which is logged.

    Raises:
        TaskError: the rates are not numbers > 0, or not as many as the folders; a record is damaged.
    """
    rates = _recorded_rates(folders) if learning_rate is None else _given_rates(learning_rate, len(folders))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [
        Checkpoint(name=name, learning_rate=rate, path=str(_digested(folder)))
        for name, folder, rate in zip(names, folders, rates, strict=True)
    ]


def folder_of(checkpoint: Checkpoint) -> Path:
    """The folder of a checkpoint of `find_checkpoints`."""
    if checkpoint.path is None:
        raise TaskError(f"checkpoint {checkpoint.name!r} has no path; take it from the task's checkpoints()")
    path = Path(checkpoint.path)
    return path.parent if path.suffix == ".safetensors" else path


def run_folders(folder: Path) -> list[Path]:
    """A checkpoint's folder, and its run's where the Trainer wrote it."""
    return [folder, folder.parent] if CHECKPOINT.fullmatch(folder.name) else [folder]


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        TaskError: it can't be read or is no object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{file} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{file} is damaged: it holds no JSON object")
    return data


def _trained(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a run's folder, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = {child: CHECKPOINT.fullmatch(child.name) for child in folder.iterdir() if child.is_dir()}
    steps = {child: int(match[1]) for child, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise TaskError(
            f"model folder {folder} does not exist (looked from {Path.cwd()}); models are read from local folders "
            "only: download it first"
        )
    if is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise TaskError(f"{folder} holds an adapter's configuration, but no {ADAPTER_WEIGHTS}")
    elif not (folder / "config.json").is_file():
        raise TaskError(f"{folder} holds no model: config.json is missing")
    elif not list(folder.glob("*.safetensors")):
        raise TaskError(
            f"{folder} holds no .safetensors file; other formats can run code when they are read: load the model and "
            "write it again with save_pretrained"
        )


def _digested(folder: Path) -> Path:
    """The weights' one file, so that an index knows when it has changed; the folder where there are several."""
    file = folder / (ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)
    return file if file.is_file() else folder


def _given_rates(learning_rate: float | str | Sequence[float], count: int) -> list[float]:
    parts = learning_rate.split(",") if isinstance(learning_rate, str) else learning_rate
    parts = [parts] if isinstance(parts, int | float) else parts
    try:
        rates = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise TaskError(f"learning_rate is {learning_rate!r}, expected a number, or one for each checkpoint") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise TaskError(f"learning_rate is {learning_rate!r}, expected numbers > 0")
    if len(rates) not in (1, count):
        raise TaskError(f"learning_rate has {len(rates)} numbers for {count} checkpoints; give one, or one for each")
    return rates * count if len(rates) == 1 else rates


def _recorded_rates(folders: Sequence[Path]) -> list[float]:
    recorded = [_recorded_rate(folder) for folder in folders]
    missing = [str(folder) for folder, rate in zip(folders, recorded, strict=True) if rate is None]
    if missing and len(missing) < len(folders):
        raise TaskError(
            f"learning rates are recorded for some checkpoints and not for {', '.join(missing)}: their influences "
            "can't be added; give learning_rate, one for each"
        )
    if missing:
        _log.warning(
            "no learning rate is recorded beside %s: taken as 1, so influences are not in units of a training step; "
            "give learning_rate (--learning-rate on the command line) to set it",
            ", ".join(missing),
        )
    return [1.0 if rate is None else rate for rate in recorded]


def _recorded_rate(folder: Path) -> float | None:
    """The last rate above 0 that the Trainer logged up to the checkpoint's own step."""
    file = folder / TRAINER_STATE
    if not file.is_file():
        return None
    state = read_json(file)
    try:
        at = int(state["global_step"])
        logged = [(int(entry["step"]), entry["learning_rate"]) for entry in state["log_history"] if _is_rate(entry)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TaskError(f"{file} is damaged ({type(error).__name__}: {error}); give learning_rate") from error
    before = [(step, float(rate)) for step, rate in logged if step <= at]
    return max(before, key=lambda entry: entry[0])[1] if before else None


def _is_rate(entry: dict[str, Any]) -> bool:
    rate = entry.get("learning_rate")
    return isinstance(rate, int | float) and 0 < rate < float("inf")
