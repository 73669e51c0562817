"""What every product's launch says alike: how operands are multiplied, and by how many warps."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from blockell_kernels._triton._device import dot_precision, upcast


class Pipelined(Protocol):
    """A way to run a product: `Tiling`, `Walk`, `Strip`."""

    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...


def arithmetic(t: Tensor, tiling: Pipelined) -> dict[str, Any]:
    """Launch options of a product of operands like `t`."""
    return {
        "PRECISION": dot_precision(t.dtype, t.device),
        "UPCAST": upcast(t),
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
