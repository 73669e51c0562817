"""Convolutions as products: every position of the output is a token, its window the input.

Legend: S samples, P positions of the output, c input channels, m output channels, k elements of the
kernel; n = c k inputs of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

DIMENSIONS: dict[Callable[..., Any], int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
}
"""Spatial dimensions of each kind of convolution."""

_Size = int | str | Sequence[int]


class Convolution(NamedTuple):
    """One call of torch's function, its arguments by the names that torch gives them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: _Size = 1
    padding: _Size = 0
    dilation: _Size = 1
    groups: int = 1

    def windows(self, x: Tensor) -> Tensor:
        """[S * P, n] from x [S, c, ...] or [c, ...]: what `weight.flatten(1)` multiplies."""
        kernel = self.weight.shape[2:]
        dims = len(kernel)
        if x.ndim == dims + 1:
            x = x[None]
        stride, dilation = _each(self.stride, dims), _each(self.dilation, dims)
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        x = functional.pad(x, _padding(self.padding, spans))
        for i in range(dims):
            x = x.unfold(2 + i, spans[i], stride[i])[..., :: dilation[i]]
        # [S, c, positions..., kernel...] -> [S, positions..., c, kernel...]
        return x.movedim(1, 1 + dims).reshape(-1, self.weight[0].numel())


def _each(size: _Size, dims: int) -> list[int]:
    if isinstance(size, int):
        return [size] * dims
    sizes = [int(s) for s in size]
    return sizes * dims if len(sizes) == 1 else sizes


def _padding(padding: _Size, spans: Sequence[int]) -> list[int]:
    """What `functional.pad` takes: before and after, the last dimension first."""
    if padding == "same":
        both = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    elif padding == "valid":
        both = [(0, 0)] * len(spans)
    else:
        both = [(p, p) for p in _each(padding, len(spans))]
    return [side for pair in reversed(both) for side in pair]
