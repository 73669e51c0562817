"""Block-ELL linear on the CPU by gathered block products, and when they beat the dense product.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens;
G = row_group, H = G*B outputs per row group, R/G groups.

The rows of a group share their columns, so the tiles of a group are one [H, K*B] matrix and
forward is `y_g = x[:, columns of g] W_g^T`: a gather of B-wide column blocks, then one product.
Two schedules, both with buffers that stay in the cache and never hold [N, R*K*B]:

- *batched*: for each chunk of tokens gather the columns of all groups, then one batched product.
  Threads work on different groups, so it serves many groups and short ones.
- *looped*: for each group a gather of (a chunk of) all tokens, then one product straight into the
  result. Serves a few tall groups. grad_input is always looped, adding each group's product to its
  columns with `index_add_` (sequential, hence deterministic), except with few tokens.

Index errors: `index_select` and `index_add_` check every column, so one outside [0, C) never reads
or writes out of bounds. What they say of it is made the IndexError of the dense product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from blockell_kernels._backends import Backend, Case, Pattern, Verdict
from blockell_kernels._cpu_rule import few_tokens, verdict
from blockell_kernels._cpu_scratch import scratch
from blockell_kernels._dense import check_columns, with_spare_slots

ProductT = TypeVar("ProductT", bound=Callable[..., Tensor])
TALL = 64
FEW_GROUPS = 8
TOKENS_PER_CHUNK = 4096  # looped
BUFFER_ELEMENTS = 2**19
"""Batched: 2 MiB of float32. Of 11 shapes, forward products take 0.97, weight gradients 0.95 of the
time with 4 MiB (one thread, medians in turns); 1 MiB is as good, 0.5 and 8 MiB are worse."""
MIN_TOKENS_PER_CHUNK = 32
FRESH_ELEMENTS = 2**15
"""128 KiB of float32, from which fresh memory comes from the operating system: 1 MiB of it made an
input gradient of 256 tokens, 256 -> 128 take 1195 us instead of 311."""


def pack(values: Tensor, pattern: Pattern) -> Tensor:
    """W_g for all groups: [R/G, H, K*B] from values [R, slots, B, B]."""
    G, B, K = pattern.row_group, pattern.B, pattern.num_live
    groups = pattern.R // G
    tiles = values[:, :K].view(groups, G, K, B, B)
    return tiles.permute(0, 1, 3, 2, 4).reshape(groups, G * B, K * B)


def unpack(packed: Tensor, pattern: Pattern) -> Tensor:
    """The inverse of `pack`: [R, slots, B, B], zeros in spare slots."""
    G, B, K, R = pattern.row_group, pattern.B, pattern.num_live, pattern.R
    tiles = packed.view(R // G, G, B, K, B).permute(0, 1, 3, 2, 4).reshape(R, K, B, B)
    return with_spare_slots(tiles, pattern).contiguous()  # the reshape may have been a view


def _few_tokens(N: int, pattern: Pattern) -> bool:
    return few_tokens(N, pattern.R, pattern.num_live, pattern.B, pattern.row_group)


def _looped(N: int, pattern: Pattern) -> bool:
    """Whether forward loops over groups: a few tall ones, and tokens enough to fill a product."""
    few_tall = (
        pattern.row_group * pattern.B >= TALL and pattern.R // pattern.row_group <= FEW_GROUPS
    )
    return few_tall and not _few_tokens(N, pattern)


def _chunk(N: int, pattern: Pattern) -> int:
    """Tokens per chunk of the batched schedule, at least 1."""
    width = pattern.groups.numel() * pattern.B
    return max(1, min(N, max(MIN_TOKENS_PER_CHUNK, BUFFER_ELEMENTS // width)))


def _forward_batched(x: Tensor, W: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    groups, H, KB = W.shape
    N, B = x.shape[0], pattern.B
    x_blocks, y = x.view(N, pattern.C, B), x.new_empty(N, groups, H)
    columns = pattern.groups.reshape(-1)
    step = _chunk(N, pattern)
    buffer = scratch(x, step, columns.numel(), B)
    for start in range(0, N, step):
        part = y[start : start + step]
        gathered = buffer[: part.shape[0]]
        torch.index_select(x_blocks[start : start + step], 1, columns, out=gathered)
        inputs = gathered.view(-1, groups, KB).transpose(0, 1)
        # not straight into y: threads that write H-wide columns of it disturb each other
        product = torch.bmm(inputs, W.transpose(1, 2)).transpose(0, 1)
        if bias is None:
            part.copy_(product)
        else:
            torch.add(product, bias.view(groups, H), out=part)
    return y.view(N, groups * H)


def _forward_looped(x: Tensor, W: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    groups, H, KB = W.shape
    N, B = x.shape[0], pattern.B
    x_blocks, y = x.view(N, pattern.C, B), x.new_empty(N, groups * H)
    step = min(N, TOKENS_PER_CHUNK)
    buffer = scratch(x, step, pattern.num_live, B)
    for start in range(0, N, step):
        x_part = x_blocks[start : start + step]
        gathered = buffer[: x_part.shape[0]]
        for g, columns in enumerate(pattern.groups.unbind()):
            outputs = slice(g * H, (g + 1) * H)
            target = y[start : start + step, outputs]
            torch.index_select(x_part, 1, columns, out=gathered)
            if bias is None:
                torch.mm(gathered.view(-1, KB), W[g].T, out=target)
            else:
                torch.addmm(bias[outputs], gathered.view(-1, KB), W[g].T, out=target)
    return y


def _says_which_column(product: ProductT) -> ProductT:
    """Look for the cause of an error after it was raised: looking before costs every call."""

    @functools.wraps(product)
    def explained(*args: Any) -> Tensor:
        try:
            return product(*args)
        except (IndexError, RuntimeError):
            check_columns(args[-1])
            raise

    return cast(ProductT, explained)


class GatheredBackend(Backend):
    """Gathered block products on the CPU."""

    name = "gathered"

    def unsupported(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on the CPU only, and the tensors are on {case.device}"
        return None

    def verdict(self, case: Case) -> Verdict:
        return verdict(case)

    @_says_which_column
    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        run = _forward_looped if _looped(x.shape[0], pattern) else _forward_batched
        return run(x, pack(values, pattern), bias, pattern)

    @_says_which_column
    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        W = pack(values, pattern)
        groups, H, KB = W.shape
        N, B = dy.shape[0], pattern.B
        dx = dy.new_zeros(N, pattern.C, B)
        if _few_tokens(N, pattern):
            size, first, second = N * groups * KB, None, None
            if size > FRESH_ELEMENTS:
                first, second = scratch(dy, 2, size).unbind()
                first = first.view(groups, N, KB)
            parts = torch.bmm(dy.view(N, groups, H).transpose(0, 1), W, out=first).transpose(0, 1)
            if second is not None:
                parts = second.view(N, groups, KB).copy_(parts)
            dx.index_add_(1, pattern.groups.reshape(-1), parts.reshape(N, groups * KB // B, B))
            return dx.view(N, pattern.C * B)
        step = min(N, TOKENS_PER_CHUNK)
        buffer = scratch(dy, step, KB)
        for start in range(0, N, step):
            dy_part, dx_part = dy[start : start + step], dx[start : start + step]
            product = buffer[: dy_part.shape[0]]
            for g, columns in enumerate(pattern.groups.unbind()):
                torch.mm(dy_part[:, g * H : (g + 1) * H], W[g], out=product)
                dx_part.index_add_(1, columns, product.view(-1, KB // B, B))
        return dx.view(N, pattern.C * B)

    @_says_which_column
    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        N, B, H = dy.shape[0], pattern.B, pattern.row_group * pattern.B
        groups, KB = pattern.R // pattern.row_group, pattern.num_live * B
        columns = pattern.groups.reshape(-1)
        x_blocks, dy_groups = x.view(N, pattern.C, B), dy.view(N, groups, H)
        dW = x.new_zeros(groups, H, KB)
        step = _chunk(N, pattern)
        buffer = scratch(x, step, columns.numel(), B)
        for start in range(0, N, step):
            dy_part = dy_groups[start : start + step]
            gathered = buffer[: dy_part.shape[0]]
            torch.index_select(x_blocks[start : start + step], 1, columns, out=gathered)
            dW.baddbmm_(dy_part.permute(1, 2, 0), gathered.view(-1, groups, KB).transpose(0, 1))
        return unpack(dW, pattern)


BACKEND = GatheredBackend()
