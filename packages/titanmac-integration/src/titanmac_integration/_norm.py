"""RMS normalisation in front of matrix products, in the precision that these will work in.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". Legend: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._triton import has_triton


class NormBeforeLinear(nn.RMSNorm):
    """``nn.RMSNorm``; on a GPU under autocast the result is what a linear layer would cast it to.

    There one kernel normalises and casts, and one more does the backward pass, with the gradient of
    the weight: torch takes most of the time for that one alone. [..., D] -> [..., D].
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _on_gpu(x):
            return super().forward(x)
        dtype = x.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        assert self.weight is not None
        assert self.eps is not None
        normed: Tensor = _Norm.apply(x, self.weight, self.eps, dtype)
        return normed


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``; compiled, torch fuses the norm itself."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return x.dtype != torch.float64 and has_triton()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from ._norm_kernels import normalise

        normed, scales = normalise(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scales)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            normed = functional.rms_norm(x.float(), weight.shape, weight.float(), ctx.eps)
            pair = torch.autograd.grad(normed, (x, weight), grad.float(), create_graph=True)
        else:
            from ._norm_kernels import normalise_backward

            pair = normalise_backward(grad, x, weight, scales)
        return *pair, None, None
