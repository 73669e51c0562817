"""Which keys a token may see, and attention over them without an [T, T] matrix of scores.

Legend: S batch, P persistent tokens, T tokens of the sequence, H heads, D head width, b block.
Rows of queries, keys and values are the P persistent tokens, then the T tokens.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from titanmac_integration._layers._rotary import Rotary, rotate

from . import _window_ops
from ._segment import TILE, attend_segments, turned_segments_

DENSE_UP_TO = {"cpu": 256, "cuda": 2048}
"""Tokens up to which one call with an [L, L] mask is faster than blocks, by type of device."""
SMALLEST_BLOCK = 64
KERNEL_WIDTHS = (16, 32, 64, 128)
"""Widths of heads that the Triton kernels take."""


class WindowPlan(NamedTuple):
    """Masks of one forward pass, shared by its layers and heads; True may be seen."""

    n_persistent: int
    window: int
    block: int
    """Tokens per block; the first block is computed together with the persistent tokens."""
    first: Tensor | None
    """[P + min(T, b), P + min(T, b)]; None stands for plain causal attention."""
    rest: Tensor | None
    """[b, P + 2 b]: persistent tokens, block before, own block; None if there is one block."""


class SegmentPlan(NamedTuple):
    """The mask of MAC: each segment sees persistent tokens, what it retrieved, and itself."""

    n_persistent: int
    window: int
    size: int
    """Tokens per segment, or T if that is less."""
    mask: Tensor
    """[size, P + 2 size]: persistent tokens, retrieved tokens, own segment."""


def attention_mask(
    n_tokens: int, *, window_size: int, n_persistent: int, device: torch.device | None = None
) -> Tensor | None:
    """Who may attend to whom: bool [L, L], True where the row may see the column.

    A token sees all persistent tokens, itself and the ``window_size - 1`` tokens before it.
    A persistent token sees persistent tokens only: if it saw the sequence, every token would see
    the future through it. None stands for plain causal attention.
    """
    if n_persistent == 0 and window_size >= n_tokens:
        return None
    position = torch.arange(n_persistent + n_tokens, device=device)
    distance = position[:, None] - position[None, :]
    in_window = (distance >= 0) & (distance < window_size)
    persistent = position < n_persistent
    return torch.where(persistent[:, None], persistent[None, :], in_window | persistent[None, :])


def near_mask(
    n_rows: int, n_before: int, *, window_size: int, device: torch.device | None = None
) -> Tensor:
    """bool [rows, before + rows]: the causal window of rows that have ``n_before`` predecessors."""
    row = torch.arange(n_before, n_before + n_rows, device=device)
    distance = row[:, None] - torch.arange(n_before + n_rows, device=device)
    return (distance >= 0) & (distance < window_size)


def plan_window(
    n_tokens: int, *, window_size: int, n_persistent: int, device: torch.device | None = None
) -> WindowPlan:
    """Masks for :func:`window_attention`."""
    dense = DENSE_UP_TO["cuda" if device is not None and device.type == "cuda" else "cpu"]
    block = n_tokens if n_tokens <= dense else max(window_size, SMALLEST_BLOCK)
    first = attention_mask(
        min(n_tokens, block), window_size=window_size, n_persistent=n_persistent, device=device
    )
    rest = None
    if n_tokens > block:
        near = near_mask(block, block, window_size=window_size, device=device)
        rest = functional.pad(near, (n_persistent, 0), value=True)
    return WindowPlan(n_persistent, window_size, block, first, rest)


def plan_segments(
    n_tokens: int,
    *,
    segment_size: int,
    window_size: int,
    n_persistent: int,
    device: torch.device | None = None,
) -> SegmentPlan:
    """Mask for :func:`segment_attention`."""
    size = min(n_tokens, segment_size)
    near = near_mask(size, 0, window_size=window_size, device=device)
    mask = functional.pad(near.repeat(1, 2), (n_persistent, 0), value=True)
    return SegmentPlan(n_persistent, window_size, size, mask)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, dropout: float
) -> Tensor:
    """Causal window attention in time and memory O(T window): [S, H, P + T, D], all of them."""
    if not _on_gpu(query, dropout):
        return _by_torch(query, key, value, plan, dropout)
    out: Tensor
    if torch.compiler.is_compiling():
        out, _ = _window_ops.attend(query, key, value, plan.window, plan.n_persistent)
    else:
        out = _Attend.apply(query, key, value, plan)
    return out


def _on_gpu(query: Tensor, dropout: float) -> bool:
    """Whether the Triton kernels take these queries: half precision, without dropout."""
    if not (_window_ops.AVAILABLE and query.is_cuda) or dropout > 0:
        return False
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in KERNEL_WIDTHS


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan) -> Tensor:
        from ._window_kernels import attend

        out, log = attend(query, key, value, plan.window, plan.n_persistent)
        ctx.save_for_backward(query, key, value, out, log)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log = ctx.saved_tensors
        plan: WindowPlan = ctx.plan
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            inputs = (query, key, value)
            with sdpa_kernel(SDPBackend.MATH):
                again = _by_torch(*inputs, plan, 0.0)
            return *torch.autograd.grad(again, inputs, grad, create_graph=True), None
        from ._window_kernels import attend_backward

        sizes = (plan.window, plan.n_persistent)
        return *attend_backward(grad, query, key, value, out, log, *sizes), None


def takes_heads(heads: Tensor, dropout: float) -> bool:
    """Whether :func:`turned_attention_` takes these heads [S, L, 3, H, D]."""
    return not torch.compiler.is_compiling() and _on_gpu(heads, dropout)


def turned_attention_(heads: Tensor, rotary: Rotary, plan: WindowPlan) -> Tensor:
    """Attention among the turned parts of ``heads`` [S, L, 3, H, D]: [S, H, L, D].

    What `turned_parts` and `window_attention` do, with queries and keys turned in place, values
    left where they are, and gradients turned back where they are computed. So ``heads`` must be
    the caller's own, and nobody's afterwards.
    """
    out: Tensor = _TurnAndAttend.apply(heads, *rotary, plan)
    return out


class _TurnAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, plan: WindowPlan) -> Tensor:
        from titanmac_integration._layers._rotary_kernels import turn

        from ._window_kernels import attend

        turn(heads.unbind(2), cos, sin, heads.unbind(2), sign=1, copy_last=False)
        out, log = attend(*_by_head(heads), plan.window, plan.n_persistent)
        ctx.save_for_backward(heads, out, log, cos, sin)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, out, log, cos, sin = ctx.saved_tensors
        plan: WindowPlan = ctx.plan
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            # what is in `heads` is turned by now, but was not where autograd knows it from: this
            # is the turned ones with the derivative of the turning
            change = heads - heads.detach()
            change = torch.cat((rotate(change[:, :, :2], cos, sin), change[:, :, 2:]), 2)
            with sdpa_kernel(SDPBackend.MATH):
                again = _by_torch(*_by_head(heads.detach() + change), plan, 0.0)
            return *torch.autograd.grad(again, heads, grad, create_graph=True), None, None, None
        from ._window_kernels import attend_backward

        grads = torch.empty_like(heads)
        sizes, into = (plan.window, plan.n_persistent), _by_head(grads)
        attend_backward(grad, *_by_head(heads), out, log, *sizes, (cos, sin), into)
        return grads, None, None, None


def _by_head(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[S, L, 3, H, D] -> three views [S, H, L, D]."""
    query, key, value = heads.transpose(1, 3).unbind(2)
    return query, key, value


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, dropout: float
) -> Tensor:
    """One masked call, or one for the first block and one for all others."""
    head = plan.n_persistent + plan.block
    first = functional.scaled_dot_product_attention(
        query[:, :, :head],
        key[:, :, :head],
        value[:, :, :head],
        attn_mask=plan.first,
        dropout_p=dropout,
        is_causal=plan.first is None,
    )
    if plan.rest is None:
        return first
    tokens = query.shape[2] - head
    rows = _blocks(query[:, :, head:], plan.block)
    keys, values = (_with_block_before(x, plan.n_persistent, plan.block) for x in (key, value))
    rest = functional.scaled_dot_product_attention(
        rows, keys, values, attn_mask=plan.rest, dropout_p=dropout
    )
    return torch.cat((first, _unblock(rest, query.shape[0], tokens)), dim=2)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved: tuple[Tensor, Tensor],
    plan: SegmentPlan,
    dropout: float,
) -> Tensor:
    """MAC's attention: [S, H, P + T, D]; ``retrieved`` keys and values [S, H, T, D].

    Token i of a segment sees the persistent tokens, what tokens up to i retrieved, and tokens up to
    i, of its own segment and window. Persistent tokens see each other.
    """
    if _whole(plan, retrieved[0].shape[2]) and _on_gpu(query, dropout):
        plain = functools.partial(_segments_plainly, plan)
        return attend_segments(query, key, value, retrieved, plan.window, plan.size, plain)
    return _segments_by_torch(query, key, value, retrieved, plan, dropout)


def takes_segments(heads: Tensor, plan: SegmentPlan, dropout: float) -> bool:
    """Whether :func:`turned_segment_attention_` takes these heads [S, L, 3, H, D]."""
    return _whole(plan, heads.shape[1] - plan.n_persistent) and takes_heads(heads, dropout)


def turned_segment_attention_(
    heads: Tensor, retrieved: Tensor, rotary: Rotary, plan: SegmentPlan
) -> Tensor:
    """`segment_attention` of heads [S, L, 3, H, D], ``retrieved`` keys and values [S, T, 2, H, D].

    As :func:`turned_attention_`: both are the caller's own, and turned in place.
    """
    behind = (rotary[0][plan.n_persistent :], rotary[1][plan.n_persistent :])
    plain = functools.partial(_segments_plainly, plan)
    return turned_segments_(heads, retrieved, (rotary, behind), plan.window, plan.size, plain)


def _whole(plan: SegmentPlan, tokens: int) -> bool:
    """Whether tiles of the kernels lie in one segment each."""
    return plan.size >= tokens or plan.size % TILE == 0


def _segments_plainly(
    plan: SegmentPlan, query: Tensor, key: Tensor, value: Tensor, *retrieved: Tensor
) -> Tensor:
    return _segments_by_torch(query, key, value, (retrieved[0], retrieved[1]), plan, 0.0)


def _segments_by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved: tuple[Tensor, Tensor],
    plan: SegmentPlan,
    dropout: float,
) -> Tensor:
    """Blocks of a segment, all in one masked call, and one for the persistent tokens."""
    P, size = plan.n_persistent, plan.size
    tokens = query.shape[2] - P
    rows = _blocks(query[:, :, P:], size)
    keys, values = (
        torch.cat(
            (
                _repeat(x[:, :, :P], _count(tokens, size)),
                _blocks(recalled, size),
                _blocks(x[:, :, P:], size),
            ),
            dim=2,
        )
        for x, recalled in zip((key, value), retrieved, strict=True)
    )
    rest = functional.scaled_dot_product_attention(
        rows, keys, values, attn_mask=plan.mask, dropout_p=dropout
    )
    rest = _unblock(rest, query.shape[0], tokens)
    if not P:
        return rest
    first = functional.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P])
    return torch.cat((first, rest), dim=2)


def _count(tokens: int, size: int) -> int:
    return -(-tokens // size)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[S, H, T, D] -> [S n, H, size, D], the last block filled with zeros.

    Zeros stand behind the last token, where no token looks; their own rows are cut off again.
    """
    count = _count(x.shape[2], size)
    padded = functional.pad(x, (0, 0, 0, count * size - x.shape[2]))
    return padded.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)


def _unblock(x: Tensor, batch: int, tokens: int) -> Tensor:
    """The inverse of :func:`_blocks`."""
    count = _count(tokens, x.shape[2])
    return x.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _with_block_before(x: Tensor, n_persistent: int, block: int) -> Tensor:
    """Keys of all blocks but the first: [S, H, P + T, D] -> [S (n - 1), H, P + 2 block, D]."""
    tokens = x[:, :, n_persistent:]
    count = _count(tokens.shape[2] - block, block)
    own = _blocks(tokens[:, :, block:], block)
    before = _blocks(tokens[:, :, : count * block], block)
    return torch.cat((_repeat(x[:, :, :n_persistent], count), before, own), dim=2)


def _repeat(x: Tensor, count: int) -> Tensor:
    """[S, H, P, D] -> [S n, H, P, D]: each sequence's persistent tokens for each of its blocks."""
    return x[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
