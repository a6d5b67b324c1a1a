"""From passages to tokens: which of them the model reads, and whose losses count.

Legend: B examples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .causal_lm_models import Tokenizer
from .causal_lm_passages import Passage

NOT_COUNTED = -100
MAX_CHARACTERS_PER_TOKEN = 256  # a query of more is refused unread


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One example as the model reads it.

    Attributes:
        ids: at most max_length.
        counted: positions of the tokens whose losses count; token 0 has none, since nothing comes before it.
        num_before_cut: tokens that the text has.
    """

    ids: tuple[int, ...]
    counted: range
    num_before_cut: int

    @property
    def is_cut(self) -> bool:
        return self.num_before_cut > len(self.ids)


class Encoder:
    """Passages into tokens.

    Args:
        tokenizer: of the model.
        max_length: tokens that are read of one text; the rest is cut off.
        vocabulary: ids that the model knows.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, vocabulary: int) -> None:
        self._tokenizer, self.max_length, self._vocabulary = tokenizer, max_length, vocabulary

    def encode(self, passages: Sequence[Passage], *, answer_only: bool) -> list[Tokens]:
        """The tokens of each passage.

        With `answer_only` those of a completion count: they begin where the tokens of the prompt alone and of the whole
        text part, so a token that both share counts.

        Raises:
            ValueError: the tokenizer gives an id that the model does not know.
        """
        whole = self._tokenizer([passage.text for passage in passages])
        prompts = self._tokenizer([passage.prompt for passage in passages]) if answer_only else []
        encoded = []
        for row, ids in enumerate(whole):
            if ids and max(ids) >= self._vocabulary:
                raise ValueError(
                    f"the tokenizer gives token {max(ids)}, but the model knows {self._vocabulary}: they don't belong "
                    "together"
                )
            first = _shared(prompts[row], ids) if answer_only and passages[row].prompt else 0
            kept = tuple(ids[: self.max_length])
            encoded.append(Tokens(ids=kept, counted=range(max(first, 1), len(kept)), num_before_cut=len(ids)))
        return encoded

    def encode_query(self, passage: Passage, *, answer_only: bool, position: int | None) -> Tokens:
        """The tokens of a query, which must fit whole.

        Raises:
            ValueError: it is too long, too short, or has no such position.
        """
        if len(passage.text) > MAX_CHARACTERS_PER_TOKEN * self.max_length:
            raise ValueError(f"the text has {len(passage.text)} characters; at most {self.max_length} tokens are read")
        [tokens] = self.encode([passage], answer_only=answer_only)
        count = len(tokens.ids)
        if tokens.is_cut:
            raise ValueError(f"the text has {tokens.num_before_cut} tokens; at most {self.max_length} are read")
        if position is not None:
            if not 1 <= position < count:
                raise ValueError(
                    f'"position" is {position}, but the text has {count} tokens: expected 1 to {count - 1} (token 0 '
                    "has no loss, since nothing comes before it)"
                )
            return Tokens(ids=tokens.ids, counted=range(position, position + 1), num_before_cut=count)
        if not tokens.counted:
            raise ValueError(f"the text has {count} tokens and none to predict; it needs a token, and one before it")
        return tokens


def padded(examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """A batch, padded on the right: what stands in the padding is masked, so token 0 does for every tokenizer."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)  # [B, T]
    labels = torch.full(shape, NOT_COUNTED)  # [B, T]
    for row, example in enumerate(examples):
        count, counted = len(example.ids), slice(example.counted.start, example.counted.stop)
        ids[row, :count] = torch.tensor(example.ids)
        mask[row, :count] = 1
        labels[row, counted] = ids[row, counted]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(prompt, whole, strict=False):
        if one != other:
            break
        count += 1
    return count
