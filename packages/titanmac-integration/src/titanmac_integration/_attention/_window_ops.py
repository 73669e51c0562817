"""Window attention as an operator that compiled models call: the same Triton kernels as elsewhere.

Legend: S batch, L rows (persistent tokens, then those of the sequence), H heads, D head width.

Only compiled code comes here: an operator costs the host more than an autograd function does, and
its gradient cannot be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanmac_integration._layers._triton import has_triton

AVAILABLE = has_triton()


@torch.library.custom_op("titanmac::window_attention", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, window: int, n_persistent: int
) -> tuple[Tensor, Tensor]:
    """Outputs [S, H, L, D] and log-partitions (base 2) [S, H, L] of such queries, keys, values."""
    from ._window_kernels import attend

    return attend(query, key, value, window, n_persistent)


@torch.library.custom_op("titanmac::window_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    n_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    from ._window_kernels import attend_backward

    return attend_backward(grad, query, key, value, out, log, window, n_persistent)


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, window: int, n_persistent: int
) -> tuple[Tensor, Tensor]:
    return _rows_first(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    n_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_first(query), _rows_first(key), _rows_first(value)


def _rows_first(like: Tensor) -> Tensor:
    """As in `_window_kernels`, which needs Triton."""
    S, H, L, D = like.shape
    return like.new_empty(S, L, H, D).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.sizes = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None


attend.register_autograd(_backward, setup_context=_keep)
