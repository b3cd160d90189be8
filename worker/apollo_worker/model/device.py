"""Whether an error of the accelerator stays: then nothing works on it in this process any more."""

from __future__ import annotations

import torch


def is_device_lost(error: BaseException) -> bool:
    """Whether the process must end for `error`: not for running out of memory, nor for what no device raised.

    Only torch's own calls raise AcceleratorError; Triton's launcher ("Triton Error [CUDA]: ..."), cuBLAS and
    NCCL raise a RuntimeError. So the context itself is asked: an error that stays comes back from every call.
    """
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # AcceleratorError is one
        return True
    return False
