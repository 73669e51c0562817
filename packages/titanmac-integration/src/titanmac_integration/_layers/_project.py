"""Dense linear layers as the model calls them: on a GPU gradients come in float32 at once.

torch sums the columns of the bias's gradient at a quarter of the memory's speed, and in half
precision; under autocast it writes the weight's in half precision, too, and casts it afterwards.
Legend: N rows, C features that come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from ._triton import has_triton

WIDE_PRODUCTS = hasattr(torch.ops.aten.addmm, "dtype_out")
"""Whether this torch multiplies half precision into float32."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; the kernel's way where ``layer`` is a plain ``nn.Linear`` on a GPU."""
    if type(layer) is not nn.Linear or layer.bias is None or has_hooks(layer) or not _on_gpu(x):
        result: Tensor = layer(x)
        return result
    return _Biased.apply(_linear(x, layer.weight, layer.bias.detach()), layer.bias)


def project_from(layer: nn.Module, x: Tensor, first: int) -> Tensor:
    """``layer(x)[..., first:]``, alone where ``layer`` is a plain ``nn.Linear``."""
    if type(layer) is not nn.Linear or layer.bias is None or has_hooks(layer):
        result: Tensor = layer(x)[..., first:]
        return result
    weight, bias = layer.weight[first:], layer.bias[first:]
    if not _on_gpu(x):
        return functional.linear(x, weight, bias)
    return _Biased.apply(_linear(x, weight, bias.detach()), bias)


def project_apart(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``layer(x)`` in two terms, for who adds it to something anyway: the product, and the bias.

    None for the bias: the first is the whole.
    """
    if type(layer) is not nn.Linear or has_hooks(layer) or not _on_gpu(x):
        return project(layer, x), None
    return _linear(x, layer.weight, None), layer.bias


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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` for a bias without gradient."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype != torch.float32 or not WIDE_PRODUCTS:
        return functional.linear(x, weight, bias)
    product: Tensor = _Product.apply(x.to(torch.get_autocast_dtype(device)), weight, bias)
    return product


class _Product(torch.autograd.Function):
    """x W^T + bias in half precision of x, with the gradient of W in float32, never rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, half)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, half, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, half = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            return grad @ weight.to(x.dtype), (rows.t() @ inputs).to(weight.dtype), None
        grad_x = grad @ half if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = wide_product(rows.t(), inputs)
        return grad_x, grad_weight, None


def wide_product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """``left @ right`` of half precision in float32, added to ``total`` in its memory."""
    # the product is added up in float32 anyway: as such it need not be written, read and cast
    with torch.autocast("cuda", enabled=False):
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


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
