"""Memory that CPU products gather into, kept from call to call.

Fresh memory of some megabytes comes from the operating system page by page, and each page costs
more than gathering into it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

MAX_ELEMENTS = 2**22
"""What is kept per thread and dtype, at most: 16 MiB of float32."""
_kept = threading.local()


def scratch(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised CPU tensor, to be let go before the next call in the same thread."""
    size = math.prod(shape)
    if size > MAX_ELEMENTS:
        return like.new_empty(shape)
    found: dict[str, Tensor] = _kept.__dict__
    name = str(like.dtype)
    kept = found.get(name)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # or it could be written to in that mode alone
            kept = found[name] = torch.empty(size, dtype=like.dtype, device="cpu")
    return kept[:size].view(shape)
