"""Causal language models, adapters and tokenizers from local folders: nothing is fetched, and no folder's code is run.

transformers and peft are imported when they are first needed: they take seconds, and other tasks do without them.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from loopsway.indexer.task import TaskError

from .causal_lm_checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, read_json

ADAPTER_PREFIX = "base_model.model."  # what peft puts before the names of the model it wraps
ATTENTIONS = ("sdpa", "eager")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
BYTES = "bytes"  # the tokenizer of models that read bytes: the ids are the bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What this task needs of one."""

    def __call__(self, texts: Sequence[str], /) -> list[list[int]]:
        """The token ids of each text, with the special tokens that the model's texts begin or end with."""
        ...


def base_folder(folder: Path, base: str | None) -> Path:
    """The folder of the model that a checkpoint's adapter belongs to; the checkpoint's own where it is no adapter.

    Raises:
        TaskError: it is not on this machine.
    """
    if not is_adapter(folder):
        if base is not None:
            raise TaskError(f"a base model ({base}) was given, but {folder} holds no adapter; drop one of them")
        return folder
    if base is None and (folder / "config.json").is_file() and _has_own_weights(folder):
        return folder
    named = base or str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    for candidate in (Path(named), folder / named):
        if (candidate / "config.json").is_file():
            return candidate
    raise TaskError(
        f"the adapter in {folder} belongs to the model {named!r}, which is no model's folder here; give "
        "base='path/to/its/folder' (--task-arg base=... on the command line)"
    )


def load_config(folder: Path) -> Any:
    """The model's configuration."""
    with _named(f"the model's configuration in {folder}"), extra("transformers"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def skeleton(folder: Path) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes."""
    config = load_config(folder)
    with _named(f"the model of {folder}"), extra("transformers"), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)


def attention_of(model: nn.Module) -> str:
    """The faster attention of ATTENTIONS that this kind of model has."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def load_model(folder: Path, base: Path, *, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model in eval mode, on the CPU. Under an adapter, only the adapter's parameters require gradients.

    Args:
        folder: of the checkpoint.
        base: from `base_folder`.
        dtype: of all its parameters.
        attention: one of ATTENTIONS.

    Raises:
        TaskError: the files are not whole, or are of no causal language model.
    """
    with _named(f"the model in {base}"), _quiet(), _without_adapter(base) as plain:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            plain,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=dtype,
            output_loading_info=True,
        )
    model, found = loaded
    if broken := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise TaskError(
            f"the weights in {base} lack {len(broken)} of the model's parameters ({', '.join(broken[:4])}), which "
            "would be left random: the files are not whole, or of another model"
        )
    return (_adapted(model, folder, dtype) if is_adapter(folder) else model).eval()


def load_tokenizer(named: str | None, folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer that was named, "bytes" or a folder, or that in the first of the folders which holds one.

    Raises:
        TaskError: no folder holds one, or it can't be loaded.
    """
    if named == BYTES:
        return _bytes_of
    places = folders if named is None else [Path(named)]
    place = next((place for place in places if any((place / file).is_file() for file in TOKENIZER_FILES)), None)
    if place is None:
        raise TaskError(
            f"no tokenizer's files are in {', '.join(map(str, places))}; give tokenizer='path/to/folder', or 'bytes' "
            "for a model that reads bytes (--task-arg tokenizer=... on the command line)"
        )
    with _named(f"the tokenizer in {place}"), extra("transformers"):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), verbose=False, return_attention_mask=False)["input_ids"]

    return ids


@contextmanager
def extra(*modules: str) -> Generator[None]:
    """Turns a missing module of the extra into the line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in modules:
            raise
        raise TaskError(f"a Hugging Face model needs {error.name}: pip install 'loopsway[hf]'") from error


def _bytes_of(texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def _has_own_weights(folder: Path) -> bool:
    return any(file.name != ADAPTER_WEIGHTS for file in folder.glob("*.safetensors"))


def _adapted(model: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    with _named(f"the adapter in {folder}"), extra("peft"), warnings.catch_warnings():
        # peft asks the model for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise TaskError(
                f"the adapter in {folder} is a learned prompt ({config.peft_type}), which adds tokens to every text; "
                "adapters that change the layers, such as LoRA, can be attributed"
            )
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False)
    return adapted.to(dtype)


@contextmanager
def _named(what: str) -> Generator[None]:
    """Turns what transformers and peft raise over damaged or foreign files into a line that names them."""
    try:
        yield
    except TaskError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError, UserWarning) as error:
        raise TaskError(f"{what} can't be loaded ({type(error).__name__}: {error})") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' own bar for each checkpoint, which would cut through ours."""
    with extra("transformers"):
        from transformers.utils import logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _without_adapter(folder: Path) -> Generator[Path]:
    """The folder, or one with links to all its files but the adapter's, which transformers would load by itself."""
    if not is_adapter(folder):
        yield folder
        return
    with TemporaryDirectory(prefix="loopsway-") as links:
        for file in folder.iterdir():
            if file.is_file() and file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                (Path(links) / file.name).symlink_to(file.resolve())
        yield Path(links)
