"""Where the Gluon kernels run."""

from __future__ import annotations

import triton
from torch import Tensor

from blockell_kernels._triton._device import INTERPRETED, capability

# Before 3.6 Gluon had other names and another way to start partitions.
SUPPORTED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def runs_on(t: Tensor) -> bool:
    """Whether these kernels run on the operand's device and take its dtype (16-bit floats)."""
    return (
        SUPPORTED
        and not INTERPRETED
        and t.is_cuda
        and t.element_size() == 2
        and capability(t.device)[0] == 9
    )
