"""Whether memory ran out, whichever library says so and however."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    # On a CPU, torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
