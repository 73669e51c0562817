"""RMS normalisation in front of matrix products, in the precision that these will work in.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". Legend: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._project import has_hooks
from ._triton import has_triton


class NormBeforeLinear(nn.RMSNorm):
    """``nn.RMSNorm``; on a GPU under autocast the result is what a linear layer would cast it to.

    There one kernel normalises and casts, and one more does the backward pass, with the gradient of
    the weight: torch takes most of the time for that one alone. [..., D] -> [..., D].
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _on_gpu(x):
            return super().forward(x if self.weight is None else x.to(self.weight.dtype))
        return self._by_kernels(x, None)[1]

    def after_adding(
        self, x: Tensor, added: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x + added + bias`` and its norm; on a GPU in the same pass. None adds nothing."""
        if added is None:
            return x, self(x)
        if not _on_gpu(x) or has_hooks(self):
            x = x + (added if bias is None else added + bias)
            return x, self(x)
        return self._by_kernels(x, added, bias)

    def _by_kernels(
        self, x: Tensor, added: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype if added is None else torch.result_type(x, added)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        assert self.weight is not None
        assert self.eps is not None
        if added is None:
            return x, _Norm.apply(x, self.weight, self.eps, dtype)
        pair: tuple[Tensor, Tensor] = _AddAndNorm.apply(
            x, added, bias, self.weight, self.eps, dtype
        )
        return pair


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``; compiled, torch fuses the norm itself."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return x.dtype != torch.float64 and has_triton()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from ._norm_kernels import normalise

        _, normed, scales = normalise(x, None, None, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scales)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(grad, x, weight, ctx.eps), None, None
        from ._norm_kernels import normalise_backward

        dtypes = (x.dtype, x.dtype)
        grad_x, _, grad_weight, _ = normalise_backward(
            grad, None, x, weight, scales, dtypes, need_sum=False
        )
        return grad_x, grad_weight, None, None


class _AddAndNorm(torch.autograd.Function):
    """A sum and its norm. The sum's gradient is that of both, a bias's is the sum over its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from ._norm_kernels import normalise

        total, normed, scales = normalise(x, added, bias, weight, eps, dtype)
        ctx.save_for_backward(total, weight, scales)
        ctx.eps, ctx.dtypes = eps, (x.dtype, added.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, past: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        need_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
        grad_weight = None
        if grad is None and past is None:
            return None, None, None, None, None, None
        if grad is not None and not torch.is_grad_enabled():
            from ._norm_kernels import normalise_backward

            grad_x, grad_added, grad_weight, grad_bias = normalise_backward(
                grad, past, total, weight, scales, ctx.dtypes, need_sum=need_bias
            )
        else:
            if grad is not None:
                through, grad_weight = _differentiable(grad, total, weight, ctx.eps)
                past = through if past is None else past + through
            assert past is not None
            grad_x, grad_added = past.to(ctx.dtypes[0]), past.to(ctx.dtypes[1])
            grad_bias = past.flatten(0, -2).sum(0, dtype=torch.float32) if need_bias else None
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_added, grad_bias, grad_weight, None, None


def _differentiable(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Gradients of ``x`` and ``weight`` that can be differentiated in turn."""
    normed = functional.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return torch.autograd.grad(normed, (x, weight), grad.float(), create_graph=True)
