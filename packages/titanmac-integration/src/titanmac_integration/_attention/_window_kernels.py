# mypy: ignore-errors
"""Triton kernels for causal window attention with persistent tokens: unseen keys cost nothing.

The scheme is FlashAttention-2's (Dao 2023): scores of a tile of queries and keys exist in registers
only, the backward pass computes them again from the log-partitions. Legend: S batch, H heads, L
rows, D head width, P persistent tokens (rows 0 to P - 1), W window, M and N rows of a tile of
queries and of keys.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
GRAD_QUERY = {"M": 64, "N": 32, "num_warps": 4, "num_stages": 3}
GRAD_KEY = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _visible(row, column, L, P, W):
    """[rows, columns] of rows [:, None] and columns [None, :]."""
    distance = row - column
    near = (distance >= 0) & (distance < W)
    return (near | (column < P)) & (column < L) & (row < L)


@triton.jit
def _all_visible(row, M: tl.constexpr, column, N: tl.constexpr, W):
    """Whether all M rows see all N columns from these on; rows from L on count as seeing."""
    return (column + N - 1 <= row) & (row + M - 1 - column < W)


@triton.jit
def _load(ptr, row, stride, L, D: tl.constexpr):
    """Rows [n, D] of a tensor whose rows lie ``stride`` apart; zeros from row L on."""
    lane = tl.arange(0, D)
    return tl.load(ptr + row[:, None] * stride + lane[None, :], (row < L)[:, None], other=0.0)


@triton.jit
def _query_step(
    q,
    acc,
    largest,
    total,
    start,
    first,
    k,
    v,
    k_row,
    v_row,
    scale,
    L,
    P,
    W,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    row, column = start + tl.arange(0, M), first + tl.arange(0, N)
    keys = _load(k, column, k_row, L, D)
    values = _load(v, column, v_row, L, D)
    scores = tl.dot(q, tl.trans(keys))
    # most tiles are seen as a whole: asking every element made the forward pass 1.6 times as long
    if not _all_visible(start, M, first, N, W):
        scores = tl.where(_visible(row[:, None], column[None, :], L, P, W), scores, float("-inf"))
    # in units of log 2, which is what exp2 wants; a positive scale keeps the order
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(values.dtype), values, acc)
    return acc, new, total


@triton.jit
def _window_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, log_ptr, scale, H, L, P, W,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1) * M
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    row = start + tl.arange(0, M)
    lane = tl.arange(0, D)
    inside = (row < L)[:, None]
    q = q_ptr + batch * q_batch + head * q_head
    k = k_ptr + batch * k_batch + head * k_head
    v = v_ptr + batch * v_batch + head * v_head
    query = _load(q, row, q_row, L, D)
    acc = tl.zeros((M, D), tl.float32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    persistent = tl.cdiv(P, N) * N
    for first in range(0, persistent, N):
        acc, largest, total = _query_step(
            query, acc, largest, total, start, first, k, v, k_row, v_row, scale, L, P, W, M, N, D
        )
    low = tl.maximum(persistent, tl.maximum(start - W + 1, 0) // N * N)
    for first in range(low, tl.minimum(start + M, L), N):
        acc, largest, total = _query_step(
            query, acc, largest, total, start, first, k, v, k_row, v_row, scale, L, P, W, M, N, D
        )
    total = tl.where(row < L, total, 1.0)
    out = out_ptr + batch * o_batch + head * o_head + row[:, None] * o_row + lane[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), inside)
    tl.store(log_ptr + pair * L + row, largest + tl.log2(total), row < L)


@triton.jit
def _grad_query_step(
    query,
    grad,
    delta,
    log,
    acc,
    start,
    first,
    k,
    v,
    k_row,
    v_row,
    scale,
    L,
    P,
    W,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    row, column = start + tl.arange(0, M), first + tl.arange(0, N)
    keys = _load(k, column, k_row, L, D)
    values = _load(v, column, v_row, L, D)
    scores = tl.dot(query, tl.trans(keys))
    p = tl.exp2(scores * scale - log[:, None])
    if not _all_visible(start, M, first, N, W):
        p = tl.where(_visible(row[:, None], column[None, :], L, P, W), p, 0.0)
    grad_p = tl.dot(grad, tl.trans(values))
    grad_s = (p * (grad_p - delta[:, None])).to(keys.dtype)
    return tl.dot(grad_s, keys, acc)


@triton.jit
def _store_turned_back(
    acc, ptr, stride, row, L, cos_ptr, sin_ptr, D: tl.constexpr, TURN: tl.constexpr
):  # fmt: skip
    """Store rows [n, D]; with TURN as gradients of what was turned by a rotary table [L, D]."""
    kind = ptr.dtype.element_ty
    inside = (row < L)[:, None]
    if TURN:
        n: tl.constexpr = acc.shape[0]
        half: tl.constexpr = D // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (n, 2, half)), (0, 2, 1)))
        lane = tl.arange(0, half)[None, :]
        angle = row[:, None] * D + lane
        cos = tl.load(cos_ptr + angle, inside, other=0.0)
        sin = tl.load(sin_ptr + angle + half, inside, other=0.0)
        at = ptr + row[:, None] * stride + lane
        tl.store(at, (left * cos + right * sin).to(kind), inside)
        tl.store(at + half, (right * cos - left * sin).to(kind), inside)
    else:
        at = ptr + row[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(at, acc.to(kind), inside)


@triton.jit
def _window_grad_query(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, log_ptr, delta_ptr, grad_q_ptr, cos_ptr, sin_ptr,
    scale, natural, H, L, P, W,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, d_batch, d_head, d_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Also leaves sum(out * grad) of each row in delta, for `_window_grad_key`."""
    start = tl.program_id(1) * M
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    row = start + tl.arange(0, M)
    k = k_ptr + batch * k_batch + head * k_head
    v = v_ptr + batch * v_batch + head * v_head
    query = _load(q_ptr + batch * q_batch + head * q_head, row, q_row, L, D)
    out = _load(out_ptr + batch * o_batch + head * o_head, row, o_row, L, D)
    grad = _load(grad_ptr + batch * g_batch + head * g_head, row, g_row, L, D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + pair * L + row, delta, row < L)
    log = tl.load(log_ptr + pair * L + row, row < L, other=0.0)
    acc = tl.zeros((M, D), tl.float32)
    persistent = tl.cdiv(P, N) * N
    for first in range(0, persistent, N):
        acc = _grad_query_step(
            query, grad, delta, log, acc, start, first, k, v, k_row, v_row, scale, L, P, W, M, N, D
        )
    low = tl.maximum(persistent, tl.maximum(start - W + 1, 0) // N * N)
    for first in range(low, tl.minimum(start + M, L), N):
        acc = _grad_query_step(
            query, grad, delta, log, acc, start, first, k, v, k_row, v_row, scale, L, P, W, M, N, D
        )
    into = grad_q_ptr + batch * d_batch + head * d_head
    _store_turned_back(acc * natural, into, d_row, row, L, cos_ptr, sin_ptr, D, TURN)


@triton.jit
def _window_grad_key(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, cos_ptr, sin_ptr,
    scale, natural, H, L, P, W,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    d_batch, d_head, d_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1) * N
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    column = start + tl.arange(0, N)
    keys = _load(k_ptr + batch * k_batch + head * k_head, column, k_row, L, D)
    values = _load(v_ptr + batch * v_batch + head * v_head, column, v_row, L, D)
    q = q_ptr + batch * q_batch + head * q_head
    g = grad_ptr + batch * g_batch + head * g_head
    grad_k = tl.zeros((N, D), tl.float32)
    grad_v = tl.zeros((N, D), tl.float32)
    # persistent keys are seen by all rows, others by themselves and those after them
    low = tl.where(start < P, 0, start // M * M)
    high = tl.where(start < P, L, tl.minimum(L, start + N - 1 + W))
    for first in range(low, high, M):
        row = first + tl.arange(0, M)
        query = _load(q, row, q_row, L, D)
        grad = _load(g, row, g_row, L, D)
        log = tl.load(log_ptr + pair * L + row, row < L, other=0.0)
        delta = tl.load(delta_ptr + pair * L + row, row < L, other=0.0)
        scores = tl.dot(keys, tl.trans(query))  # [N, M]
        p = tl.exp2(scores * scale - log[None, :])
        if not _all_visible(first, M, start, N, W):
            p = tl.where(_visible(row[None, :], column[:, None], L, P, W), p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v)
        grad_p = tl.dot(values, tl.trans(grad))
        grad_s = (p * (grad_p - delta[None, :])).to(query.dtype)
        grad_k = tl.dot(grad_s, query, grad_k)
    offset = batch * d_batch + head * d_head
    grad_k *= natural
    _store_turned_back(
        grad_k, grad_k_ptr + offset, d_row, column, L, cos_ptr, sin_ptr, D, TURN
    )  # fmt: skip
    _store_turned_back(
        grad_v, grad_v_ptr + offset, d_row, column, L, cos_ptr, sin_ptr, D, False
    )  # fmt: skip


LOG2_E = 1.4426950408889634


def _rows_first(like: Tensor) -> Tensor:
    """Uninitialised [S, H, L, D] whose memory is in the order [S, L, H, D]."""
    S, H, L, D = like.shape
    return like.new_empty(S, L, H, D).transpose(1, 2)


def _ready(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, persistent: int) -> tuple[Tensor, Tensor]:
    """Outputs [S, H, L, D] and log-partitions (base 2) [S, H, L] of bfloat16 or float16 inputs."""
    S, H, L, D = q.shape
    q, k, v = _ready(q), _ready(k), _ready(v)
    out = _rows_first(q)
    log = torch.empty(S, H, L, dtype=torch.float32, device=q.device)
    strides = [n for x in (q, k, v, out) for n in x.stride()[:3]]
    scale = D**-0.5 * LOG2_E
    grid = (S * H, triton.cdiv(L, FORWARD["M"]))
    _window_forward[grid](
        q, k, v, out, log, scale, H, L, persistent, window, *strides, D=D, **FORWARD
    )
    return out, log


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    persistent: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; written to ``into``, all with the same strides.

    With a ``rotary`` table [L, ..., D] the gradients of queries and keys before they were turned.
    """
    S, H, L, D = q.shape
    grad, q, k, v = (_ready(x) for x in (grad, q, k, v))
    grads = [_rows_first(x) for x in (q, k, v)] if into is None else into
    cos, sin = (log, log) if rotary is None else rotary
    turn = rotary is not None
    delta = torch.empty_like(log)
    natural = D**-0.5
    scale = natural * LOG2_E

    def strides(*tensors: Tensor) -> list[int]:
        return [n for x in tensors for n in x.stride()[:3]]

    grid = (S * H, triton.cdiv(L, GRAD_QUERY["M"]))
    _window_grad_query[grid](
        q, k, v, out, grad, log, delta, grads[0], cos, sin, scale, natural, H, L, persistent,
        window, *strides(q, k, v, out, grad, grads[0]), D=D, TURN=turn, **GRAD_QUERY,
    )  # fmt: skip
    grid = (S * H, triton.cdiv(L, GRAD_KEY["N"]))
    _window_grad_key[grid](
        q, k, v, grad, log, delta, grads[1], grads[2], cos, sin, scale, natural, H, L, persistent,
        window, *strides(q, k, v, grad, grads[1]), D=D, TURN=turn, **GRAD_KEY,
    )  # fmt: skip
    return tuple(grads)
