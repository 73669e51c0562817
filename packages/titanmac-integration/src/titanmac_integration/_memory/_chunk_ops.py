"""The chunks of a matrix memory as operators that compiled models call: the same kernels.

Legend: S batch, T tokens, H heads, D width, N = S H, b chunk, n chunks.

Only compiled code comes here: an operator costs the host more than an autograd function does, and
its gradient cannot be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._kernels import largest_part, precision

FACTORS = 5
"""As in `_chunk_kernels`, which needs Triton."""


def plan(chunk: int, width: int, source: torch.dtype) -> tuple[int, str]:
    """Tokens that the kernels compute at once, and how they multiply what was in ``source``."""
    from ._chunk_launch import launch

    products = precision(source)
    return largest_part(chunk, launch(products, width).chunk), products


@torch.library.custom_op("titanmac::memory_read", mutates_args=())
def read(
    tokens: Tensor,
    gates: Tensor,
    weights: Tensor,
    momentum: Tensor,
    chunk: int,
    segment: int,
    source: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `_chunked.read`. Answers, what segments retrieve, M and S [2, N, D, D], M before
    the last segment, the sum of squared errors, and the four of `Kept`.

    Without segments what belongs to them is empty.
    """
    from ._chunk_launch import read_chunks

    part, products = plan(chunk, tokens.shape[-1], source)
    answers, retrieved, final, latest, squares, kept = read_chunks(
        tokens, gates, weights, momentum, part, segment // part, products
    )
    if retrieved is None or latest is None:
        retrieved, latest = tokens.new_empty(0), tokens.new_empty(0)
    return answers, retrieved, final, latest, squares, *kept


@read.register_fake
def _(
    tokens: Tensor,
    gates: Tensor,
    weights: Tensor,
    momentum: Tensor,
    chunk: int,
    segment: int,
    source: torch.dtype,
) -> tuple[Tensor, ...]:
    S, T, _, H, D = tokens.shape
    new = tokens.new_empty
    answers = new(S, T, H, D)
    retrieved, latest = (new(S, T, H, D), new(S, H, D, D)) if segment else (new(0), new(0))
    b = min(plan(chunk, D, source)[0], T)
    N, n = S * H, -(-T // b)
    kept = new(N, n, FACTORS, b), new(N, n, b, b), new(N, T, D), new(N, n, 2, D, D)
    return answers, retrieved, new(2, N, D, D), latest, new(()), *kept


@torch.library.custom_op("titanmac::memory_read_backward", mutates_args=())
def read_backward(
    tokens: Tensor,
    gates: Tensor,
    factors: Tensor,
    inverse: Tensor,
    errors: Tensor,
    states: Tensor,
    d_answers: Tensor | None,
    d_retrieved: Tensor | None,
    d_final: Tensor | None,
    d_latest: Tensor | None,
    segment: int,
    source: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, gates, and of M and S before the first token [S, H, D, D]."""
    from ._chunk_launch import Kept, read_chunks_backward

    S, _, _, H, D = tokens.shape
    chunk = inverse.shape[-1]
    d_tokens, d_gates, d_first = read_chunks_backward(
        tokens,
        gates,
        Kept(factors, inverse, errors, states),
        d_answers,
        d_retrieved,
        None,
        d_latest,
        None if d_final is None else d_final[0],
        None if d_final is None else d_final[1],
        chunk,
        segment // chunk,
        precision(source),
    )
    d_weights, d_momentum = (
        part.clone(memory_format=torch.contiguous_format).view(S, H, D, D)
        for part in d_first.unbind(1)
    )
    return d_tokens, d_gates, d_weights, d_momentum


@read_backward.register_fake
def _(
    tokens: Tensor,
    gates: Tensor,
    factors: Tensor,
    inverse: Tensor,
    errors: Tensor,
    states: Tensor,
    d_answers: Tensor | None,
    d_retrieved: Tensor | None,
    d_final: Tensor | None,
    d_latest: Tensor | None,
    segment: int,
    source: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, _, _, H, D = tokens.shape
    new = tokens.new_empty
    return new(tokens.shape), new(gates.shape), new(S, H, D, D), new(S, H, D, D)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, gates, _, _, _, ctx.segment, ctx.source = inputs
    *_, squares, factors, inverse, errors, states = output
    kept = factors, inverse, errors, states
    ctx.save_for_backward(tokens, gates, *kept)
    ctx.mark_non_differentiable(squares, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    answers, retrieved, final, latest = grads[:4]
    if not ctx.segment:
        retrieved, latest = None, None
    found = read_backward(
        *ctx.saved_tensors, answers, retrieved, final, latest, ctx.segment, ctx.source
    )
    return *found, None, None, None


read.register_autograd(_backward, setup_context=_keep)
