"""Tiny causal language models with random weights, written to folders as transformers, its Trainer and peft write them.

Importing this sets what keeps transformers from the network; the test's subprocesses inherit it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

VOCABULARY, POSITIONS = 288, 64
ROWS: list[dict[str, Any]] = [
    {"prompt": "two and two", "completion": " are four", "source": "sums", "score": 1, "tags": ["a"]},
    {"prompt": "a cat", "completion": " sat on the mat", "source": "cats", "score": 0.5, "tags": []},
    {"text": "the dog barked", "source": None, "score": 2},
    {"prompt": "three less one is", "completion": " two", "source": "sums", "score": 3},
    {"prompt": "ünï", "completion": " čode — ✓", "source": "other", "score": 4},
    {"prompt": "the end", "completion": " of the tale", "source": "cats", "score": 5},
]


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE, learned from the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row.get("text", row.get("prompt", "") + row.get("completion", "")) for row in ROWS]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def new_model(kind: str) -> Any:
    """A random model: llama, gpt2 or dory, which applies layers 1 and 2 three times."""
    import torch
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "num_attention_heads": 2, "hidden_size": 16}
    rope = {**small, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**rope, num_hidden_layers=3))
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    layers: dict[str, Any] = {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    }
    config = transformers.DoryConfig(**rope, **layers, n_recurrent_loops=3, head_dim=8, sliding_window=32)
    return transformers.DoryForCausalLM(config)


def write_model(folder: Path, kind: str = "llama", *, tokenizer: bool = True) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    new_model(kind).save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_rows(file: Path, rows: Sequence[Any] = ROWS) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_run(folder: Path, kind: str, *, learning_rate: float = 0.01, model: Any = None) -> tuple[Path, Any]:
    """What the Trainer leaves after four steps, with checkpoints at 2 and 4; also the Trainer itself."""
    import torch
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        learning_rate=learning_rate, weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    ids = torch.arange(64).reshape(8, 8) * 3 % VOCABULARY
    trainer = Trainer(
        model=model or new_model(kind),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # pyright: ignore[reportArgumentType]
    )
    trainer.train()
    write_tokenizer(folder)
    return folder, trainer


def new_adapter(model: Any, config: Any = None) -> Any:
    """The model with an adapter; without a configuration, LoRA of rank 2 on its query and value projections."""
    from peft import LoraConfig, get_peft_model

    if config is None:
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():  # peft asks the model for an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config)
