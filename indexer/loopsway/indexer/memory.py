"""What an error says of memory and devices, whichever library raises it and however."""

from __future__ import annotations

import torch

# Of plain RuntimeErrors and AcceleratorErrors: torch on a CPU, the CUDA runtime, cuBLAS, cuFFT.
_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in _NO_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether a device is lost to this process: after a failed assertion or access on it, every later call fails."""
    if is_out_of_memory(error):
        return False
    if hasattr(torch, "AcceleratorError"):
        return isinstance(error, torch.AcceleratorError)
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error: ")  # torch before 2.8
