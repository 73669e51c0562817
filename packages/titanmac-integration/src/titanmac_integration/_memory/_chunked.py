"""A matrix memory by kernels: `linear_memory` of tokens and gates as the module has them.

Legend: S batch, T tokens, H heads, D width, N = S H, b chunk, n chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import _chunk_ops
from ._gates import Gates
from ._kernels import gradients_again, largest_part, on_gpu
from ._linear import linear_memory
from ._mlp import recall

SMALLEST_CHUNK = 16
"""Shorter chunks waste what a program holds."""
LARGEST_WIDTH, LARGEST_EXACT_WIDTH = 128, 64
"""Wider memories do not fit into a program; exact products take three times the registers."""


class Read(NamedTuple):
    """What a matrix memory says about some tokens, and what it is after them."""

    answers: Tensor
    """q_t M_t [S, T, H, D]."""
    retrieved: Tensor | None
    """q_t M as M was before the segment of t [S, T, H, D], if there are segments."""
    weights: Tensor
    """M after the last token [S, H, D, D]."""
    momentum: Tensor
    """S after the last token [S, H, D, D]."""
    segment: Tensor | None
    """M before the last segment [S, H, D, D], if there are segments."""
    squares: Tensor
    """Sum of the squared errors of all tokens, cut off from the graph."""


def kernels_take(tokens: Tensor, chunk: int, source: torch.dtype) -> bool:
    """Whether `read` runs for these tokens [S, T, 3, H, D]."""
    most = LARGEST_EXACT_WIDTH if source == torch.float32 else LARGEST_WIDTH
    wide = tokens.shape[-1] > most
    if wide or tokens.dtype != torch.float32 or not on_gpu(tokens, compiled=True):
        return False
    if tokens.is_cuda and (torch.version.hip or _generation(tokens) < 8):
        return False  # which have no TF32
    return largest_part(chunk, 64) >= min(chunk, SMALLEST_CHUNK)


def _generation(x: Tensor) -> int:
    # of the properties, which torch.compile knows as constants
    generation: int = torch.cuda.get_device_properties(x.device).major
    return generation


def read(
    tokens: Tensor,
    gates: Tensor,
    weights: Tensor,
    momentum: Tensor,
    chunk: int,
    segment: int,
    source: torch.dtype,
) -> Read:
    """Read tokens into a matrix memory and answer each from the memory that includes it.

    Args:
        tokens: queries, keys, values [S, T, 3, H, D].
        gates: [3, S, H, T]; see `Gates`.
        weights: M before the first token [S, H, D, D].
        momentum: S before the first token [S, H, D, D].
        chunk: tokens computed at once, or a multiple of that.
        segment: tokens of a segment, a multiple of ``chunk``; 0 for no segments.
        source: in what the projections were; see `precision`.
    """
    if torch.compiler.is_compiling():
        answers, retrieved, final, last, squares, *_ = _chunk_ops.read(
            tokens, gates, weights, momentum, chunk, segment, source
        )
        new, speed = (part.view_as(weights) for part in final.unbind(0))
        if not segment:
            return Read(answers, None, new, speed, None, squares)
        return Read(answers, retrieved, new, speed, last, squares)
    part, products = _chunk_ops.plan(chunk, tokens.shape[-1], source)
    return Read(*_Read.apply(tokens, gates, weights, momentum, part, segment // part, products))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        gates: Tensor,
        weights: Tensor,
        momentum: Tensor,
        chunk: int,
        per_segment: int,
        precision: str,
    ) -> tuple[Tensor | None, ...]:
        from ._chunk_launch import read_chunks

        answers, retrieved, final, latest, squares, kept = read_chunks(
            tokens, gates, weights, momentum, chunk, per_segment, precision
        )
        ctx.save_for_backward(tokens, gates, weights, momentum, *kept)
        ctx.set_materialize_grads(False)
        ctx.options = chunk, per_segment, precision
        ctx.mark_non_differentiable(squares)
        new = (part.view_as(weights) for part in final.unbind(0))
        return answers, retrieved, *new, latest, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again
        inputs, kept = saved[:4], saved[4:]
        chunk, per_segment, precision = ctx.options
        if torch.is_grad_enabled():

            def plain(*inputs: Tensor) -> tuple[Tensor | None, ...]:
                return _plain(*inputs, chunk=chunk, per_segment=per_segment)

            return *gradients_again(plain, inputs, grads[:5]), None, None, None
        from ._chunk_launch import Kept, read_chunks_backward

        tokens, gates, weights, _ = inputs
        d_answers, d_retrieved, d_weights, d_momentum, d_segment = grads[:5]
        d_tokens, d_gates, d_states = read_chunks_backward(
            tokens,
            gates,
            Kept(*kept),
            d_answers,
            d_retrieved,
            None,
            d_segment,
            d_weights,
            d_momentum,
            chunk,
            per_segment,
            precision,
        )
        states = (part.reshape(weights.shape) for part in d_states.unbind(1))
        return d_tokens, d_gates, *states, None, None, None


def _plain(
    tokens: Tensor,
    gates: Tensor,
    weights: Tensor,
    momentum: Tensor,
    *,
    chunk: int,
    per_segment: int,
) -> tuple[Tensor | None, ...]:
    """`_Read` in torch's operators, but for the errors."""
    query, key, value = tokens.permute(2, 0, 3, 1, 4).unbind(0)
    answers, _, (starts,), (last,), (speed,) = linear_memory(
        query, key, value, Gates(*gates.unbind(0)), (weights,), (momentum,), chunk
    )
    retrieved, segment = None, None
    if per_segment:
        segments = starts[:, :, ::per_segment]
        retrieved = recall_segments(query, (segments,), per_segment * chunk).transpose(1, 2)
        segment = segments[:, :, -1]
    return answers.transpose(1, 2), retrieved, last, speed, segment


def recall_segments(query: Tensor, segments: tuple[Tensor, ...], size: int) -> Tensor:
    """q_t M [S, H, T, D] for the M of each segment of ``size`` tokens: [S, H, segments, ...]."""
    tokens = query.shape[2]
    size = min(size, tokens)
    blocks = functional.pad(query, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
    return recall(blocks, segments).flatten(2, 3)[:, :, :tokens]
