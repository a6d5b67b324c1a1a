"""The bit strings of the parity task: which there are, which are held out, and how a batch of them is encoded.

Knows nothing of the model but its tokens. Legend: B strings, T tokens (the answer token and the longest string's bits).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

ANSWER, PADDING = 2, 3  # after the bits' own tokens, 0 and 1
NUM_TOKENS = 4
MIN_LENGTH = 2
MIN_HELD_OUT_LENGTH = 6  # shorter strings are too few: each one kept back would be a sizeable part of its length
HELD_OUT_FRACTION = 8  # one string in so many


def is_held_out(bits: str) -> bool:
    """Whether training never sees the string: one in eight, by a hash, and the alternating ones (0101... and 1010...).

    A rule rather than a draw: the answer is the same in every run, whatever its seed.
    """
    if len(bits) < MIN_HELD_OUT_LENGTH:
        return False
    alternates = "00" not in bits and "11" not in bits
    return alternates or zlib.crc32(bits.encode()) % HELD_OUT_FRACTION == 0


def training_strings(length: int) -> list[str]:
    """All strings of this length that training may see, in numerical order."""
    return [bits for bits in _strings(length) if not is_held_out(bits)]


def held_out_strings(length: int) -> list[str]:
    """All strings of this length that training never sees, in numerical order; none below MIN_HELD_OUT_LENGTH."""
    return [bits for bits in _strings(length) if is_held_out(bits)]


def parity(bits: str) -> int:
    """1 when the number of ones is odd, else 0."""
    return bits.count("1") % 2


def encode(strings: Sequence[str]) -> torch.Tensor:
    """Tokens of a batch, int64 [B, T]: the answer token, the bits, then padding up to the longest string.

    The answer token comes first so that it has the same place whatever the string's length.
    """
    longest = max(len(bits) for bits in strings)
    return torch.tensor([[ANSWER, *map(int, bits), *[PADDING] * (longest - len(bits))] for bits in strings])


def labels(strings: Sequence[str]) -> torch.Tensor:
    """The strings' parities, int64 [B]."""
    return torch.tensor([parity(bits) for bits in strings])


def _strings(length: int) -> list[str]:
    return [format(number, f"0{length}b") for number in range(2**length)]
