# mypy: ignore-errors
"""Triton kernels for MAC's attention: persistent tokens, what a segment retrieved, and itself.

The scheme is that of `_window_kernels`. Legend: S batch, H heads, P persistent tokens, T tokens,
L = P + T rows, D head width, W window, G tokens of a segment, M and N rows of a tile of queries and
of keys. G is a multiple of M and N, or at least T: so a tile of tokens lies in one segment.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._segment import TILE
from ._window_kernels import LOG2_E, _load, _ready, _rows_first

FORWARD = {"M": TILE, "N": TILE, "num_warps": 4, "num_stages": 3}
GRAD_QUERY = {"M": TILE, "N": 32, "num_warps": 4, "num_stages": 3}
GRAD_KEY = {"M": TILE, "N": TILE, "num_warps": 4, "num_stages": 3}


@triton.jit
def _rows(tile, P, T, N: tl.constexpr):
    """First row of a tile, and the row where its kind ends: tokens first, then persistent ones."""
    tiles = tl.cdiv(T, N)
    of_tokens = tile < tiles
    start = tl.where(of_tokens, P + tile * N, (tile - tiles) * N)
    return of_tokens, start, tl.where(of_tokens, P + T, P)


@triton.jit
def _seen(token, other, T, W):
    """Whether ``token`` sees the token ``other`` of its segment, or what that one retrieved."""
    return (token >= other) & (token - other < W) & (other < T)


@triton.jit
def _first_seen(token, W, G, N: tl.constexpr):
    """Where the tiles of keys begin that the tokens from ``token`` on may see."""
    segment = token // G * G
    return segment + tl.maximum(token - W + 1 - segment, 0) // N * N


@triton.jit
def _all_seen(token, M: tl.constexpr, other, N: tl.constexpr, W):
    """Whether M tokens of a segment see all N others from these on; those from T on count as so."""
    return (other + N - 1 <= token) & (token + M - 1 - other < W)


@triton.jit
def _query_step(acc, largest, total, scores, values, scale):
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
    return acc, new, total


@triton.jit
def _segment_forward(
    q_ptr, k_ptr, v_ptr, rk_ptr, rv_ptr, out_ptr, log_ptr, scale, H, P, T, W, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    rk_batch, rk_head, rk_row, rv_batch, rv_head, rv_row, o_batch, o_head, o_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    of_tokens, start, end = _rows(tl.program_id(1), P, T, M)
    row, lane = start + tl.arange(0, M), tl.arange(0, D)
    token = row - P
    k = k_ptr + batch * k_batch + head * k_head
    v = v_ptr + batch * v_batch + head * v_head
    rk = rk_ptr + batch * rk_batch + head * rk_head
    rv = rv_ptr + batch * rv_batch + head * rv_head
    query = _load(q_ptr + batch * q_batch + head * q_head, row, q_row, end, D)
    acc = tl.zeros((M, D), tl.float32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for first in range(0, P, N):
        column = first + tl.arange(0, N)
        keys, values = _load(k, column, k_row, P, D), _load(v, column, v_row, P, D)
        scores = tl.where((column < P)[None, :], tl.dot(query, tl.trans(keys)), float("-inf"))
        acc, largest, total = _query_step(acc, largest, total, scores, values, scale)
    low = tl.where(of_tokens, _first_seen(start - P, W, G, N), 0)
    high = tl.where(of_tokens, tl.minimum(start - P + M, T), 0)
    for first in range(low, high, N):
        other = first + tl.arange(0, N)
        whole = _all_seen(start - P, M, first, N, W)
        keys, values = _load(rk, other, rk_row, T, D), _load(rv, other, rv_row, T, D)
        scores = tl.dot(query, tl.trans(keys))
        if not whole:
            scores = tl.where(_seen(token[:, None], other[None, :], T, W), scores, float("-inf"))
        acc, largest, total = _query_step(acc, largest, total, scores, values, scale)
        column = P + other
        keys, values = _load(k, column, k_row, P + T, D), _load(v, column, v_row, P + T, D)
        scores = tl.dot(query, tl.trans(keys))
        if not whole:
            scores = tl.where(_seen(token[:, None], other[None, :], T, W), scores, float("-inf"))
        acc, largest, total = _query_step(acc, largest, total, scores, values, scale)
    total = tl.where(row < end, total, 1.0)
    out = out_ptr + batch * o_batch + head * o_head + row[:, None] * o_row + lane[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), (row < end)[:, None])
    tl.store(log_ptr + pair * (P + T) + row, largest + tl.log2(total), row < end)


@triton.jit
def _grad_query_step(p, grad, delta, acc, keys, values):
    grad_p = tl.dot(grad, tl.trans(values))
    grad_s = (p * (grad_p - delta[:, None])).to(keys.dtype)
    return tl.dot(grad_s, keys, acc)


@triton.jit
def _segment_grad_query(
    q_ptr, k_ptr, v_ptr, rk_ptr, rv_ptr, out_ptr, grad_ptr, log_ptr, delta_ptr, grad_q_ptr,
    scale, natural, H, P, T, W, G,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    rk_batch, rk_head, rk_row, rv_batch, rv_head, rv_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, d_batch, d_head, d_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Also leaves sum(out * grad) of each row in delta, for `_segment_grad_key`."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    of_tokens, start, end = _rows(tl.program_id(1), P, T, M)
    row, lane = start + tl.arange(0, M), tl.arange(0, D)
    token = row - P
    k = k_ptr + batch * k_batch + head * k_head
    v = v_ptr + batch * v_batch + head * v_head
    rk = rk_ptr + batch * rk_batch + head * rk_head
    rv = rv_ptr + batch * rv_batch + head * rv_head
    query = _load(q_ptr + batch * q_batch + head * q_head, row, q_row, end, D)
    out = _load(out_ptr + batch * o_batch + head * o_head, row, o_row, end, D)
    grad = _load(grad_ptr + batch * g_batch + head * g_head, row, g_row, end, D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + pair * (P + T) + row, delta, row < end)
    log = tl.load(log_ptr + pair * (P + T) + row, row < end, other=0.0)
    acc = tl.zeros((M, D), tl.float32)
    for first in range(0, P, N):
        column = first + tl.arange(0, N)
        keys, values = _load(k, column, k_row, P, D), _load(v, column, v_row, P, D)
        p = tl.exp2(tl.dot(query, tl.trans(keys)) * scale - log[:, None])
        p = tl.where((column < P)[None, :], p, 0.0)
        acc = _grad_query_step(p, grad, delta, acc, keys, values)
    low = tl.where(of_tokens, _first_seen(start - P, W, G, N), 0)
    high = tl.where(of_tokens, tl.minimum(start - P + M, T), 0)
    for first in range(low, high, N):
        other = first + tl.arange(0, N)
        whole = _all_seen(start - P, M, first, N, W)
        keys, values = _load(rk, other, rk_row, T, D), _load(rv, other, rv_row, T, D)
        p = tl.exp2(tl.dot(query, tl.trans(keys)) * scale - log[:, None])
        if not whole:
            p = tl.where(_seen(token[:, None], other[None, :], T, W), p, 0.0)
        acc = _grad_query_step(p, grad, delta, acc, keys, values)
        column = P + other
        keys, values = _load(k, column, k_row, P + T, D), _load(v, column, v_row, P + T, D)
        p = tl.exp2(tl.dot(query, tl.trans(keys)) * scale - log[:, None])
        if not whole:
            p = tl.where(_seen(token[:, None], other[None, :], T, W), p, 0.0)
        acc = _grad_query_step(p, grad, delta, acc, keys, values)
    into = grad_q_ptr + batch * d_batch + head * d_head + row[:, None] * d_row + lane[None, :]
    tl.store(into, (acc * natural).to(grad_q_ptr.dtype.element_ty), (row < end)[:, None])


@triton.jit
def _segment_grad_key(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    scale, natural, H, P, T, W, G,
    behind,  # rows before the first token's key: P, or 0 for retrieved keys
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, d_batch, d_head, d_row,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // H, pair % H
    of_tokens, start, end = _rows(tl.program_id(1), behind, T, N)
    column = start + tl.arange(0, N)
    other = column - behind
    keys = _load(k_ptr + batch * k_batch + head * k_head, column, k_row, end, D)
    values = _load(v_ptr + batch * v_batch + head * v_head, column, v_row, end, D)
    q = q_ptr + batch * q_batch + head * q_head
    g = grad_ptr + batch * g_batch + head * g_head
    grad_k = tl.zeros((N, D), tl.float32)
    grad_v = tl.zeros((N, D), tl.float32)
    # a persistent key is seen by all rows, another by its own token and later ones of its segment
    token = start - behind
    high = tl.minimum(tl.minimum(T, token // G * G + G), token + N - 1 + W)
    low = tl.where(of_tokens, P + token // M * M, 0)
    high = tl.where(of_tokens, P + high, P + T)
    for first in range(low, high, M):
        row = first + tl.arange(0, M)
        query = _load(q, row, q_row, P + T, D)
        grad = _load(g, row, g_row, P + T, D)
        log = tl.load(log_ptr + pair * (P + T) + row, row < P + T, other=0.0)
        delta = tl.load(delta_ptr + pair * (P + T) + row, row < P + T, other=0.0)
        p = tl.exp2(tl.dot(keys, tl.trans(query)) * scale - log[None, :])  # [N, M]
        # a persistent key is seen by all rows
        if of_tokens & (not _all_seen(first - P, M, token, N, W)):
            p = tl.where(_seen((row - P)[None, :], other[:, None], T, W), p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v)
        grad_p = tl.dot(values, tl.trans(grad))
        grad_s = (p * (grad_p - delta[None, :])).to(query.dtype)
        grad_k = tl.dot(grad_s, query, grad_k)
    offset = batch * d_batch + head * d_head + column[:, None] * d_row
    offset += tl.arange(0, D)[None, :]
    kind = grad_k_ptr.dtype.element_ty
    tl.store(grad_k_ptr + offset, (grad_k * natural).to(kind), (column < end)[:, None])
    tl.store(grad_v_ptr + offset, grad_v.to(kind), (column < end)[:, None])


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:3]]


def _tiles(P: int, T: int, rows: int) -> int:
    return triton.cdiv(T, rows) + triton.cdiv(P, rows)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rk: Tensor, rv: Tensor, window: int, segment: int
) -> tuple[Tensor, Tensor]:
    """Outputs [S, H, L, D] and log-partitions (base 2) [S, H, L] of half precision inputs.

    ``rk`` and ``rv`` [S, H, T, D] are keys and values of what each token retrieved.
    """
    S, H, L, D = q.shape
    T = rk.shape[2]
    q, k, v, rk, rv = (_ready(x) for x in (q, k, v, rk, rv))
    out = _rows_first(q)
    log = torch.empty(S, H, L, dtype=torch.float32, device=q.device)
    _segment_forward[(S * H, _tiles(L - T, T, FORWARD["M"]))](
        q, k, v, rk, rv, out, log, D**-0.5 * LOG2_E, H, L - T, T, window, segment,
        *_strides(q, k, v, rk, rv, out), D=D, **FORWARD,
    )  # fmt: skip
    return out, log


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rk: Tensor,
    rv: Tensor,
    out: Tensor,
    log: Tensor,
    window: int,
    segment: int,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys, values, retrieved keys and retrieved values.

    Written to ``into``, if given, whose keys and values lie alike: rows contiguous.
    """
    S, H, L, D = q.shape
    T = rk.shape[2]
    P = L - T
    grad, q, k, v, rk, rv = (_ready(x) for x in (grad, q, k, v, rk, rv))
    grads = [_rows_first(x) for x in (q, k, v, rk, rv)] if into is None else into
    delta = torch.empty_like(log)
    natural = D**-0.5
    scale = natural * LOG2_E
    _segment_grad_query[(S * H, _tiles(P, T, GRAD_QUERY["M"]))](
        q, k, v, rk, rv, out, grad, log, delta, grads[0], scale, natural, H, P, T, window, segment,
        *_strides(q, k, v, rk, rv, out, grad, grads[0]), D=D, **GRAD_QUERY,
    )  # fmt: skip
    for key, value, grad_key, grad_value, behind in (
        (k, v, *grads[1:3], P),
        (rk, rv, *grads[3:], 0),
    ):
        _segment_grad_key[(S * H, _tiles(behind, T, GRAD_KEY["N"]))](
            q, key, value, grad, log, delta, grad_key, grad_value, scale, natural, H, P, T, window,
            segment, behind, *_strides(q, key, value, grad, grad_key), D=D, **GRAD_KEY,
        )  # fmt: skip
    return tuple(grads)
