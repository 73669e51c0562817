"""Launches activation functions that could not ride on a product, and sums over tokens.

Legend: h pre-activation [N, width], a = f(h), da and dh the gradients of a loss in a and h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._activation_kernels import (
    activate_elements,
    gradient_columns,
    sum_columns,
)
from blockell_kernels._triton._device import num_sms, on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div

_BLOCK = 2048
_TOKENS, _WIDTH = 32, 128
_PARTS_PER_SM = 8


def arithmetic(t: Tensor) -> str:
    """How activations are computed for a result like `t`; see `_activation_kernels`."""
    if t.element_size() != 2:
        return "exact"
    return "ptx" if t.is_cuda and torch.version.hip is None else "short"


@on_its_device
def activate(h: Tensor, activation: str) -> Tensor:
    """a = f(h) for a contiguous h."""
    a = torch.empty_like(h)
    if h.numel():
        launch(
            activate_elements,
            (ceil_div(h.numel(), _BLOCK),),
            h,
            a,
            h.numel(),
            ACTIVATION=activation,
            ARITHMETIC=arithmetic(h),
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return a


def _parts(N: int, width: int, device: torch.device) -> tuple[int, int]:
    """(parts, tokens of one): as many parts of the tokens as fill the GPU."""
    wanted = max(1, _PARTS_PER_SM * num_sms(device) // ceil_div(width, _WIDTH))
    tokens = ceil_div(ceil_div(N, wanted), _TOKENS) * _TOKENS
    return ceil_div(N, tokens), tokens


@on_its_device
def gradient(
    da: Tensor, h: Tensor, activation: str, *, recompute: bool, need_sum: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dh, a, sum of dh over the tokens) for contiguous operands [..., width].

    None for what is not asked for; the sum is float32 [width].
    """
    dh, width = torch.empty_like(h), h.shape[-1]
    a = torch.empty_like(h) if recompute else None
    if not h.numel():
        zeros = torch.zeros(width, dtype=torch.float32, device=h.device)
        return dh, a, zeros if need_sum else None
    N = h.numel() // width
    parts, tokens = _parts(N, width, h.device)
    sums = None
    if need_sum:
        sums = torch.empty(parts, width, dtype=torch.float32, device=h.device)
    launch(
        gradient_columns,
        (ceil_div(width, _WIDTH), parts),
        da,
        h,
        dh,
        a,
        sums,
        N,
        width,
        tokens,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(h),
        BT=_TOKENS,
        BW=_WIDTH,
        num_warps=8,
    )
    return dh, a, None if sums is None else sums.sum(0)


@on_its_device
def sum_over_tokens(t: Tensor) -> Tensor:
    """float32 [width]: the sum over tokens of t [N, width], whose rows are contiguous."""
    N, width = t.shape
    if not t.numel():
        return torch.zeros(width, dtype=torch.float32, device=t.device)
    parts, tokens = _parts(N, width, t.device)
    sums = torch.empty(parts, width, dtype=torch.float32, device=t.device)
    launch(
        sum_columns,
        (ceil_div(width, _WIDTH), parts),
        t,
        sums,
        N,
        width,
        t.stride(0),
        tokens,
        BT=_TOKENS,
        BW=_WIDTH,
        num_warps=8,
    )
    return sums.sum(0)
