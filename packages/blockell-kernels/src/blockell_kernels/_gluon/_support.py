"""Where the Gluon kernels run."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

# Before 3.6 Gluon had other names and another way to start partitions.
SUPPORTED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def runs_on(t: Tensor) -> bool:
    """Whether these kernels run on the operand's device and take its dtype (16-bit floats)."""
    return SUPPORTED and t.is_cuda and t.element_size() == 2 and _hopper(t.device)


@cache
def _hopper(device: torch.device) -> bool:
    # Not at the top: the Triton launchers import this package.
    from blockell_kernels._triton._device import INTERPRETED, capability

    return not INTERPRETED and capability(device)[0] == 9
