"""How operators of this package are registered with torch: autograd, autocast, the one library.

They are registered through `torch.library.Library` and not through its front `custom_op`, whose
generated autograd and aliasing checks cost 150 us per call here, as much as a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("blockell", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register_autograd(name: str, op: Any, function: type[torch.autograd.Function]) -> None:
    """Let calls of `op` that need a gradient go through `function`."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(name, kernel, "Autograd")


def register_backward(name: str, op: Any, user_name: str) -> None:
    """Register a backward operator, which has no gradient of its own and says so.

    Args:
        name: the operator's name in the library.
        op: the operator.
        user_name: the public function whose backward it is.
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(
                f"{user_name} can be differentiated once; its backward has no gradient of its own. "
                "For second derivatives use torch.func (grad of grad, hessian), which sees a dense "
                "weight, or multiply by one yourself (blockell_format.to_dense)."
            )

    register_autograd(name, op, Backward)


def register_autocast(
    name: str, op: Any, cast: Callable[[tuple[Any, ...], str], tuple[Any, ...]]
) -> None:
    """Let `op` run on what `cast(arguments, device_type)` returns where autocast is on.

    torch.library.register_autocast casts every floating operand to one fixed dtype; here the dtype
    is the one in force, and float32 probes stay as they are.
    """
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args: Any, device_type: str = device_type) -> Any:
            given = cast(args, device_type)
            with torch.autocast(device_type, enabled=False):
                return op(*given)

        library.impl(name, kernel, dispatch_key)


def cast_for_autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in the dtype that autocast asks for; float64 and integers stay."""
    if t is None or t.dtype is dtype or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


def cast_positions(
    args: tuple[Any, ...], device_type: str, positions: tuple[int, ...]
) -> tuple[Any, ...]:
    """The arguments, those at `positions` in the dtype of the autocast in force."""
    dtype, cast = torch.get_autocast_dtype(device_type), list(args)
    for position in positions:
        cast[position] = cast_for_autocast(args[position], dtype)
    return tuple(cast)


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for it."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if t is None else t
