"""Launches activation functions that could not ride on a product.

Legend: h pre-activation, a = f(h), da and dh the gradients of a loss in a and h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._triton._activation_kernels import activate_elements, gradient_elements
from blockell_kernels._triton._device import on_its_device
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div

_BLOCK = 2048


def fast(t: Tensor) -> bool:
    """Whether the polynomial error function is exact enough for results of this dtype."""
    return t.element_size() == 2


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
            FAST=fast(h),
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return a


@on_its_device
def gradient(da: Tensor, h: Tensor, activation: str, recompute: bool) -> tuple[Tensor, Tensor]:
    """(dh, a) for contiguous operands; a is `h` itself unless `recompute`."""
    dh = torch.empty_like(h)
    a = torch.empty_like(h) if recompute else h
    if h.numel():
        launch(
            gradient_elements,
            (ceil_div(h.numel(), _BLOCK),),
            da,
            h,
            dh,
            a,
            h.numel(),
            ACTIVATION=activation,
            FAST=fast(h),
            RECOMPUTE=recompute,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return dh, a
