"""The looped transformer of the parity task: one block, applied again and again, that is given the input at each step.

Knows nothing of training. The looped architecture with input injection is that of Kaissis, Mildenberger, Gomez, Menten
and Triantafillou, "Step-resolved data attribution for looped transformers" (arXiv 2602.10097, 2026), first experiment.
Legend: B strings, T tokens, D the model's width, H heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .parity_strings import NUM_TOKENS, PADDING


class Block(nn.Module):
    """The loop's body: attention and a two-layer network, each on the normalised residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 2 * width)
        self.mlp_out = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = hidden + self._attention(self.attention_norm(hidden), mask)
        return hidden + self.mlp_out(functional.gelu(self.mlp_in(self.mlp_norm(hidden))))

    def _attention(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        heads = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D/H]
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


class ParityTransformer(nn.Module):
    """Reads a bit string and gives the logits of even and odd at its answer token.

    Args:
        width: of the residual stream.
        num_heads: of the attention.
        num_loops: how often the block is applied (tau in the paper).
        max_length: of the strings; bounds the learned positions.
    """

    def __init__(self, *, width: int, num_heads: int, num_loops: int, max_length: int) -> None:
        super().__init__()
        self.num_loops = num_loops
        self.tokens = nn.Embedding(NUM_TOKENS, width)
        self.positions = nn.Embedding(1 + max_length, width)
        self.block = Block(width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, 2)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, tokens: torch.Tensor, num_loops: int | None = None) -> torch.Tensor:
        """Logits [B, 2] of the tokens [B, T]; more or fewer loops than it was trained with are allowed."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        injected = self.tokens(tokens) + self.positions(places)  # [B, T, D]
        mask = (tokens != PADDING)[:, None, None, :]  # [B, 1, 1, T]: nobody attends to padding
        hidden = torch.zeros_like(injected)
        for _ in range(self.num_loops if num_loops is None else num_loops):
            hidden = self.block(hidden + injected, mask)
        return self.readout(self.norm(hidden[:, 0]))
