# mypy: ignore-errors
"""Launches of the kernels of a matrix memory. Legend as in `_chunk_kernels`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _chunk_backward_kernels as backward
from . import _chunk_kernels as forward


class Launch(NamedTuple):
    """How the kernels run."""

    chunk: int
    """Tokens of a chunk at most: more make fewer states, and larger products within a chunk."""
    scan_columns: tuple[int, int]
    """Columns of a state that a program carries, forward and backward: fewer make more programs,
    each as long."""
    columns: int
    """Columns of a state that the other kernels take at a time."""
    scan: dict
    chunks: dict
    """For the kernels that run for all chunks at once."""


def launch(precision: str, width: int) -> Launch:
    """By what an H200 measured."""
    plain, staged = ({"num_warps": 4, "num_stages": stages} for stages in (1, 3))
    if precision == "tf32x3":  # takes three times the registers
        return Launch(32, (8, 8), 16, staged, staged)
    if width > 64:
        return Launch(32, (16, 8), 32, plain, plain)
    return Launch(64, (16, 8), 32, staged, plain)


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    factors: Tensor
    """[N, n, FACTORS, b]"""
    inverse: Tensor
    """[N, n, b, b]"""
    errors: Tensor
    """[N, T, D]"""
    states: Tensor
    """[N, n, 2, D, D]: M and S before each chunk"""


def _sizes(tokens: Tensor, chunk: int) -> tuple[int, int, int, int, int, int]:
    S, T, _, H, D = tokens.shape
    b = min(chunk, T)
    return S * H, T, b, -(-T // b), H, D


def _constants(H: int, D: int, b: int, precision: str) -> dict:
    B, DP = (max(16, triton.next_power_of_2(x)) for x in (b, D))
    return {"H": H, "D": D, "B": B, "DP": DP, "PRECISION": precision}


def read_chunks(
    tokens: Tensor,
    gates: Tensor,
    memory: Tensor,
    momentum: Tensor,
    chunk: int,
    per_segment: int,
    precision: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Kept]:
    """Answers [S, T, H, D], what segments retrieve (or None), M and S after the last token
    [2, N, D, D], M before the last segment [S, H, D, D] (or None), the sum of squared errors and
    `Kept`.

    ``per_segment`` chunks of a segment, 0 for none.
    """
    tokens, gates = tokens.contiguous(), gates.contiguous()
    memory, momentum = _rows_contiguous(memory), _rows_contiguous(momentum)
    N, T, b, n, H, D = _sizes(tokens, chunk)
    constants, tuned = _constants(H, D, b, precision), launch(precision, D)
    new = tokens.new_empty
    inverse, factors = new(N, n, b, b), new(N, n, forward.FACTORS, b)
    forward._memory_prepare[(N, n)](
        tokens, gates, inverse, factors, N, T, b, **constants, **tuned.chunks
    )
    columns = min(tuned.scan_columns[0], constants["DP"])
    slabs = constants["DP"] // columns
    errors, states = new(N, T, D), new(N, n, 2, D, D)
    final, squares = new(2, N, D, D), new(N, slabs)
    forward._memory_scan[(N, slabs)](
        tokens,
        factors,
        inverse,
        memory,
        momentum,
        errors,
        states,
        final,
        squares,
        T,
        b,
        n,
        memory.stride(0),
        momentum.stride(0),
        BV=columns,
        **constants,
        **tuned.scan,
    )
    answers = new(tokens.shape[0], T, H, D)
    retrieved = torch.empty_like(answers) if per_segment else None
    forward._memory_answer[(N, n)](
        tokens,
        gates,
        errors,
        states,
        answers,
        retrieved,
        N,
        T,
        b,
        per_segment or 1,
        D,
        BV=min(tuned.columns, constants["DP"]),
        **constants,
        **tuned.chunks,
    )
    latest = None
    if per_segment:
        last = (n - 1) // per_segment * per_segment
        latest = states[:, last, 0].clone().view(memory.shape)
    kept = Kept(factors, inverse, errors, states)
    return answers, retrieved, final, latest, squares.sum(), kept


def _rows_contiguous(matrices: Tensor) -> Tensor:
    """[S, H, D, D], contiguous but for the first dimension, which may be an expanded one."""
    return matrices if matrices[0].is_contiguous() else matrices.contiguous()


def read_chunks_backward(
    tokens: Tensor,
    gates: Tensor,
    kept: Kept,
    d_answers: Tensor | None,
    d_retrieved: Tensor | None,
    d_errors: Tensor | None,
    d_segment: Tensor | None,
    d_memory: Tensor | None,
    d_momentum: Tensor | None,
    chunk: int,
    per_segment: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, of gates, and of X before the first token [N, 2, D, D].

    ``d_segment`` is of M before the last segment.
    """
    tokens, gates = tokens.contiguous(), gates.contiguous()
    if d_answers is None:
        d_answers = torch.zeros_like(tokens[:, :, 0])
    d_answers, d_retrieved, d_errors, d_segment, d_memory, d_momentum = (
        None if grad is None else grad.contiguous()
        for grad in (d_answers, d_retrieved, d_errors, d_segment, d_memory, d_momentum)
    )
    N, T, b, n, H, D = _sizes(tokens, chunk)
    constants, tuned = _constants(H, D, b, precision), launch(precision, D)
    wide = min(tuned.columns, constants["DP"])
    columns = min(tuned.scan_columns[1], constants["DP"])
    d_tokens, d_gates = torch.empty_like(tokens), torch.empty_like(gates)
    d_states = tokens.new_empty(N, n + 1, 2, D, D)
    backward._memory_answer_backward[(N, n)](
        tokens,
        gates,
        kept.factors,
        kept.errors,
        kept.states,
        d_answers,
        d_retrieved,
        d_errors,
        d_tokens,
        d_gates,
        N,
        T,
        b,
        per_segment or 1,
        D,
        BV=wide,
        **constants,
        **tuned.chunks,
    )
    backward._memory_scan_backward[(N, constants["DP"] // columns)](
        tokens,
        kept.factors,
        kept.inverse,
        d_answers,
        d_retrieved,
        d_segment,
        d_memory,
        d_momentum,
        d_tokens,
        d_states,
        T,
        b,
        n,
        per_segment or 1,
        BV=columns,
        **constants,
        **tuned.scan,
    )
    backward._memory_error_backward[(N, n)](
        tokens,
        gates,
        kept.factors,
        kept.errors,
        kept.states,
        d_states,
        d_tokens,
        d_gates,
        N,
        T,
        b,
        D,
        BV=wide,
        **constants,
        **tuned.chunks,
    )
    return d_tokens, d_gates, d_states[:, 0]
