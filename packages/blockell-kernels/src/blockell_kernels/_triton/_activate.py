"""Launches activation functions that do not ride on a product.

Legend: h pre-activation [N, width], a = f(h), da and dh the gradients of a loss in a and h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._activation_kernels import activate_elements, gradient_tiles
from blockell_kernels._triton._device import on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._tiling import ceil_div

_BLOCK = 2048
_TOKENS, _WIDTH = 64, 128


def arithmetic(t: Tensor) -> str:
    """How activations are computed for a result like `t`; see `_activation_kernels`."""
    if t.element_size() != 2:
        return "exact"
    return "ptx" if t.is_cuda and torch.version.hip is None else "short"


@replayed
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


@replayed
@on_its_device
def gradient(
    da: Tensor,
    h: Tensor,
    activation: str,
    *,
    recompute: bool,
    need_sum: bool = False,
    overwrite: bool = False,
    overwrite_h: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dh, a, sums) for contiguous operands [..., width].

    None for what is not asked for. The sums, float32 [any, width], add up to that of dh over the
    tokens. `overwrite`: dh may take da's
    memory, and by `overwrite_h` a that of h, which works because a program reads an element of da
    and h before it writes those of dh and a.
    """
    dh = da if overwrite and da.dtype is h.dtype else torch.empty_like(h)
    width = h.shape[-1]
    a = None
    if recompute:
        a = h if overwrite_h else torch.empty_like(h)
    if not h.numel():
        zeros = torch.zeros(1, width, dtype=torch.float32, device=h.device)
        return dh, a, zeros if need_sum else None
    N = h.numel() // width
    tiles, sums = ceil_div(N, _TOKENS), None
    if need_sum:
        sums = torch.empty(tiles, width, dtype=torch.float32, device=h.device)
    launch(
        gradient_tiles,
        (ceil_div(width, _WIDTH) * tiles,),
        da,
        h,
        dh,
        a,
        sums,
        N,
        width,
        ACTIVATION=activation,
        ARITHMETIC=arithmetic(h),
        BT=_TOKENS,
        BW=_WIDTH,
        num_warps=8,
    )
    return dh, a, sums
