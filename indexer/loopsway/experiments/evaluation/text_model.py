"""A tiny looped language model over bytes: one block of attention and MLP, applied again and again.

B examples, T bytes, D the model's width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BYTES = 256  # values
HEAD_WIDTH = 16


class Block(nn.Module):
    """The loop's body, pre-norm and causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(hidden)).unflatten(-1, (3, -1, HEAD_WIDTH))  # [B, T, 3, H, .]
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]
        return hidden + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(hidden))))


class TextTransformer(nn.Module):
    """Gives the logits of each next byte; the bytes are given to the block at every step."""

    def __init__(self, *, width: int, num_loops: int, max_length: int) -> None:
        super().__init__()
        self.num_loops = num_loops
        self.bytes, self.positions = nn.Embedding(NUM_BYTES, width), nn.Embedding(max_length, width)
        self.block, self.norm = Block(width), nn.LayerNorm(width)
        self.readout = nn.Linear(width, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, NUM_BYTES]."""
        injected = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1]))
        hidden = torch.zeros_like(injected)
        for _ in range(self.num_loops):
            hidden = self.block(hidden + injected)
        return self.readout(self.norm(hidden))
