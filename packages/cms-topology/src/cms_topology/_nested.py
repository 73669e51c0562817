"""Rows of different lengths, as torch.nested holds them: the layer looks at one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def on_nested(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of the tokens in nested `x` [S, *, ..., in], with their lengths.

    Raises:
        ValueError: the layout is not `torch.jagged`, or the lengths are those of the features.
    """
    if x.layout is not torch.jagged:
        raise ValueError(
            f"x (nested, layout {x.layout}) must be a tensor, or nested with layout=torch.jagged: "
            "make it so by torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)."
        )
    ragged: int = x._ragged_idx  # type: ignore[attr-defined]
    if ragged == x.dim() - 1:
        raise ValueError("x (nested) must have lengths in another dimension than its last one.")
    offsets, lengths = x.offsets(), x.lengths()  # type: ignore[attr-defined]
    y = function(x.values())
    return torch.nested.nested_tensor_from_jagged(y, offsets, lengths, jagged_dim=ragged)
