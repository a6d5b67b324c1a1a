"""From gradients to sketches, [B, S, W], and from sketches to codes."""
