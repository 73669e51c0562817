"""Behind a memory: the norm of its answers, and the gate in front of the residual stream."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._project import has_hooks
from ._kernels import gradients_again, on_gpu


def normalised(norm: nn.RMSNorm, answers: Tensor) -> Tensor:
    """``norm(answers)`` of [..., D]; by a kernel in the precision in which a projection goes on."""
    plain = type(norm) is not nn.RMSNorm or norm.weight is None or has_hooks(norm)
    if plain or not on_gpu(answers) or answers.dtype != torch.float32:
        result: Tensor = norm(answers.to(norm.weight.dtype))
        return result
    device = answers.device.type
    dtype = norm.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    normed: Tensor = _Norm.apply(answers, norm.weight, norm.eps, dtype)
    return normed


def gated(x: Tensor, logits: Tensor, skipped: int = 0, beside: Tensor | None = None) -> Tensor:
    """sigmoid(logits) x [S, T, d_model] behind ``skipped`` rows of zeros, added to ``beside``."""
    dtypes = {x.dtype, logits.dtype, x.dtype if beside is None else beside.dtype}
    if not on_gpu(x) or len(dtypes) > 1:
        return _gated(x, logits, skipped, beside)
    result: Tensor = _Gated.apply(x, logits, skipped, beside)
    return result


def _gated(x: Tensor, logits: Tensor, skipped: int, beside: Tensor | None) -> Tensor:
    read = torch.sigmoid(logits) * x
    if skipped:
        read = functional.pad(read, (0, 0, skipped, 0))
    return read if beside is None else beside + read


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from ._answer_kernels import normalise

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normalise(x.contiguous(), weight, eps, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (functional.rms_norm(x, weight.shape, weight.float(), ctx.eps),)

            return *gradients_again(plain, (x, weight), (grad,)), None, None
        from ._answer_kernels import normalise_backward

        return *normalise_backward(grad.contiguous(), x.contiguous(), weight, ctx.eps), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, skipped: int, beside: Tensor | None) -> Tensor:
        from ._answer_kernels import gate

        ctx.save_for_backward(x, logits)
        ctx.skipped = skipped
        beside = None if beside is None else beside.contiguous()
        return gate(x.contiguous(), logits.contiguous(), skipped, beside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits = ctx.saved_tensors
        beside = grad if ctx.needs_input_grad[3] else None
        if torch.is_grad_enabled():

            def plain(x: Tensor, logits: Tensor) -> tuple[Tensor]:
                return (_gated(x, logits, ctx.skipped, None),)

            return *gradients_again(plain, (x, logits), (grad,)), None, beside
        from ._answer_kernels import gate_backward

        found = gate_backward(grad.contiguous(), x.contiguous(), logits.contiguous())
        return *found, None, beside
