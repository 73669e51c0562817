"""MAC's attention as an operator that compiled models call: the kernels of `_segment_kernels`.

Legend: S batch, H heads, T tokens, L rows (persistent tokens, then T tokens), D head width.

Only compiled code comes here, as with `_window_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._window_ops import _rows_first


@torch.library.custom_op("titanmac::segment_attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved_key: Tensor,
    retrieved_value: Tensor,
    window: int,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """Outputs [S, H, L, D] and log-partitions (base 2) [S, H, L]; see `attend_segments`."""
    from ._segment_kernels import attend

    return attend(query, key, value, retrieved_key, retrieved_value, window, segment)


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved_key: Tensor,
    retrieved_value: Tensor,
    window: int,
    segment: int,
) -> tuple[Tensor, Tensor]:
    return _rows_first(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("titanmac::segment_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved_key: Tensor,
    retrieved_value: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, retrieved keys and retrieved values."""
    from ._segment_kernels import attend_backward

    inputs = (query, key, value, retrieved_key, retrieved_value)
    q, k, v, rk, rv = attend_backward(grad, *inputs, out, log, window, segment)
    return q, k, v, rk, rv


@attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved_key: Tensor,
    retrieved_value: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (_rows_first(x) for x in (query, key, value))
    return q, k, v, _rows_first(retrieved_key), _rows_first(retrieved_value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, segment = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.sizes = window, segment


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None


attend.register_autograd(_backward, setup_context=_keep)
