"""Activation functions that can be fused into the products around them.

Legend: h pre-activation, a = f(h), da and dh the gradients of a loss in a and h.

On the GPU 16-bit tensors take one Triton kernel per pass over memory; everything else torch's own
operations. Both compute f of h as it is stored, rounded to its dtype: so a fused product, an
unfused one and a recomputation in the backward pass agree.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from blockell_kernels._gpu import gpu_activations, gpu_sums
from blockell_kernels._stats import wide

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "gelu", "gelu_tanh", "relu", "silu")


def check_activation(activation: str) -> None:
    """Raise ValueError for a name that is not one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation (={activation!r}) must be one of {', '.join(ACTIVATIONS)}.")


def activate(h: Tensor, activation: str) -> Tensor:
    """a = f(h), same shape and dtype; `h` itself for "none"."""
    if activation == "none":
        return h
    if kernels := gpu_activations(h):
        result: Tensor = kernels.activate(h, activation)
        return result
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    return functional.relu(h) if activation == "relu" else functional.silu(h)


def activation_gradient(da: Tensor, h: Tensor, activation: str) -> Tensor:
    """dh = da f'(h), same shape and dtype; `da` itself for "none"."""
    if activation == "none":
        return da
    if (kernels := gpu_activations(h)) and da.is_contiguous():
        dh: Tensor = kernels.gradient(da, h, activation, recompute=False)[0]
        return dh
    aten = torch.ops.aten
    if activation in ("gelu", "gelu_tanh"):
        kind = "tanh" if activation == "gelu_tanh" else "none"
        return aten.gelu_backward.default(da, h, approximate=kind)
    if activation == "relu":
        return aten.threshold_backward.default(da, h, 0)
    return aten.silu_backward.default(da, h)


def gradient_and_activation(
    da: Tensor,
    h: Tensor,
    activation: str,
    *,
    recompute: bool,
    need_sum: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dh, a, sums) from the gradient of a and h [N, width].

    The sums [any, width] add up to that of dh over the tokens. On the GPU in one pass, dh in the
    memory of da, which is not to be used afterwards, and if `overwrite` a in that of h. None for
    what is not asked for.
    """
    if activation != "none" and (kernels := gpu_activations(h)) and da.is_contiguous():
        result: tuple[Tensor, Tensor | None, Tensor | None] = kernels.gradient(
            da,
            h,
            activation,
            recompute=recompute,
            need_sum=need_sum,
            overwrite=True,
            overwrite_h=overwrite,
        )
        return result
    dh = activation_gradient(da, h, activation)
    a = activate(h, activation) if recompute else None
    return dh, a, sum_over_tokens(dh)[None] if need_sum else None


def sum_over_tokens(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[width]: the rows of t [N, width] added up in float32 at least; of t's dtype if not named."""
    dtype = t.dtype if dtype is None else dtype
    if kernels := gpu_sums(t):
        result: Tensor = kernels.column_sums(t, dtype)
        return result
    # torch adds 16-bit numbers up in float32, but on the CPU slowly
    return (t if t.is_cuda else wide(t)).sum(0).to(dtype)
