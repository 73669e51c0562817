"""Convolutions as products: every position of the output is a token, its window the input.

Legend: S samples, P positions of the output, c input channels, k elements of the kernel; G groups
of channels; n = c k / G inputs of a token and group.
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
TRANSPOSED: dict[Callable[..., Any], int] = {
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}
"""Spatial dimensions of each kind of transposed convolution."""

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
        """[S * P, G, n], without groups [S * P, n], from x [S, c, ...] or [c, ...]: what
        `weight.flatten(1)` multiplies."""
        kernel = self.weight.shape[2:]
        dims = len(kernel)
        stride, dilation = _each(self.stride, dims), _each(self.dilation, dims)
        x = functional.pad(_batched(x, dims), _padding(self.padding, _spans(kernel, dilation)))
        return _in_groups(_unfolded(x, kernel, stride, dilation), self.groups)


class TransposedConvolution(NamedTuple):
    """The same of a transposed convolution: one of stride 1 over the input with zeros between, by
    kernels that are turned round."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: _Size = 1
    padding: _Size = 0
    output_padding: _Size = 0
    groups: int = 1
    dilation: _Size = 1

    def windows(self, x: Tensor) -> Tensor:
        """As of `Convolution`; turned round, so that the kernels need not be."""
        kernel = self.weight.shape[2:]
        dims = len(kernel)
        x = _batched(x, dims)
        stride, dilation = _each(self.stride, dims), _each(self.dilation, dims)
        lengths = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
        apart = x.new_zeros(*x.shape[:2], *lengths)
        places: list[Any] = [slice(None, None, s) for s in stride]
        everywhere = (..., *places)
        apart[everywhere] = x
        sides: list[int] = []
        each = (
            _spans(kernel, dilation),
            _each(self.padding, dims),
            _each(self.output_padding, dims),
        )
        for span, padding, more in reversed(list(zip(*each, strict=True))):
            sides += [span - 1 - padding, span - 1 - padding + more]
        windows = _unfolded(functional.pad(apart, sides), kernel, [1] * dims, dilation)
        return _in_groups(windows.flip(list(range(-dims, 0))), self.groups)


def _batched(x: Tensor, dims: int) -> Tensor:
    return x[None] if x.ndim == dims + 1 else x


def _spans(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]


def _unfolded(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """[S, c, ...] -> [S, positions..., c, kernel...]."""
    for i, span in enumerate(_spans(kernel, dilation)):
        x = x.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
    return x.movedim(1, 1 + len(kernel))


def _in_groups(windows: Tensor, groups: int) -> Tensor:
    """[S, positions..., c, kernel...] -> [S * P, G, n] or [S * P, n]."""
    dims = (windows.ndim - 2) // 2
    n = windows.shape[1 + dims :].numel() // groups
    return windows.reshape(-1, n) if groups == 1 else windows.reshape(-1, groups, n)


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
