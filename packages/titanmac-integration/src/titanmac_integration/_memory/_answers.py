"""Behind a memory: the norm of its answers, and the gate in front of the residual stream."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from titanmac_integration._layers._project import has_hooks

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


def gated(
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    skipped: int = 0,
    beside: Tensor | None = None,
) -> Tensor:
    """sigmoid(logits + bias) x behind ``skipped`` rows of zeros, added to ``beside``.

    ``x`` [S, T, C]; of ``logits`` [S, T or more, C] the last T rows; ``bias`` [C].
    """
    dtypes = {x.dtype, logits.dtype, x.dtype if beside is None else beside.dtype}
    if not on_gpu(x) or len(dtypes) > 1:
        return _gated(x, logits, bias, skipped, beside)
    result: Tensor = _Gated.apply(x, logits, bias, skipped, beside)
    return result


def _gated(
    x: Tensor, logits: Tensor, bias: Tensor | None, skipped: int, beside: Tensor | None
) -> Tensor:
    logits = logits[:, logits.shape[1] - x.shape[1] :]
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
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
    def forward(
        ctx: Any,
        x: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        skipped: int,
        beside: Tensor | None,
    ) -> Tensor:
        from ._answer_kernels import gate

        ctx.save_for_backward(x, logits, bias)
        ctx.skipped = skipped
        beside = None if beside is None else beside.contiguous()
        return gate(x.contiguous(), logits.contiguous(), bias, skipped, beside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, bias = ctx.saved_tensors
        beside = grad if ctx.needs_input_grad[4] else None
        if torch.is_grad_enabled():

            def plain(x: Tensor, logits: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                return (_gated(x, logits, bias, ctx.skipped, None),)

            return *gradients_again(plain, (x, logits, bias), (grad,)), None, beside
        from ._answer_kernels import gate_backward

        found = gate_backward(grad.contiguous(), x.contiguous(), logits.contiguous(), bias)
        return *found, None, beside
