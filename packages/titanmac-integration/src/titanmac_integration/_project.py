"""Dense linear layers as the model calls them: on a GPU the bias gets its gradient from a kernel.

torch sums the columns of the gradient at a quarter of the memory's speed, and in half precision.
Legend: N rows, C features that come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from ._triton import has_triton

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; the kernel's way where ``layer`` is a plain ``nn.Linear`` on a GPU."""
    if type(layer) is not nn.Linear or layer.bias is None or has_hooks(layer) or not _on_gpu(x):
        result: Tensor = layer(x)
        return result
    return _Biased.apply(functional.linear(x, layer.weight, layer.bias.detach()), layer.bias)


def project_apart(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``layer(x)`` in two terms, for who adds it to something anyway: the product, and the bias.

    None for the bias: the first is the whole.
    """
    if type(layer) is not nn.Linear or has_hooks(layer) or not _on_gpu(x):
        return project(layer, x), None
    return functional.linear(x, layer.weight), layer.bias


def has_hooks(module: nn.Module) -> bool:
    """Whether something hangs on ``module`` being called."""
    if "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS):
        return True
    return any(getattr(nn_module, f"_global_{name}") for name in _GLOBAL_HOOKS)


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernel takes gradients of what ``x`` becomes; compiled, torch fuses."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return x.dtype != torch.float64 and has_triton()


class _Biased(torch.autograd.Function):
    """[..., C], to which ``bias`` [C] has been added already, with the gradient of ``bias``."""

    @staticmethod
    def forward(ctx: Any, summed: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = None
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
                total = rows.sum(0, dtype=torch.float32)
            else:
                from ._project_kernels import column_sums

                total = column_sums(rows)
            total = total.to(ctx.dtype)
        return grad, total
