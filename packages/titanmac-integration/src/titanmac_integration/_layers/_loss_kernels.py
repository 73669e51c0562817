# mypy: ignore-errors
"""A Triton kernel for the cross entropy of long rows of logits: read twice, written once.

One program owns a row. Its first pass keeps a running maximum and a running sum (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"), its second puts the gradient in the
logits' place; a row of a large vocabulary is then still in the GPU's second-level cache, mostly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanmac_integration._labels import IGNORE_INDEX

BLOCK = 8192
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softmax_gradient(
    logits_ptr,  # [N, V], rows contiguous
    targets_ptr,  # int64 [N]
    log_sums_ptr,  # float32 [N]
    stride,
    V,
    z_weight,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits_ptr + row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)  # in units of log 2, which is what exp2 wants
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        column = first + lane
        x = tl.load(start + column, column < V, float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32) * LOG2_E
        before = largest
        largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp2(before - largest) + tl.sum(tl.exp2(x - largest), 0)
    log_sum = largest + tl.log2(total)
    natural = log_sum / LOG2_E
    tl.store(log_sums_ptr + row, natural)
    if GRADIENT:
        target = tl.load(targets_ptr + row)
        counts = target != IGNORED
        scale = 1.0 + 2.0 * z_weight * natural
        # backwards: what was read last is still in the cache
        blocks = tl.cdiv(V, BLOCK)
        for done in range(blocks):
            column = (blocks - 1 - done) * BLOCK + lane
            inside = column < V
            x = tl.load(start + column, inside, float("-inf"), eviction_policy="evict_first")
            x = x.to(tl.float32) * LOG2_E
            gradient = tl.exp2(x - log_sum) * scale - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(start + column, gradient, inside, eviction_policy="evict_first")


def softmax_gradient_(logits: Tensor, targets: Tensor, z_weight: float, gradient: bool) -> Tensor:
    """As `_linear_loss.softmax_gradient_`, for float32, bfloat16 and float16."""
    log_sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _softmax_gradient[(len(logits),)](
        logits,
        targets,
        log_sums,
        logits.stride(0),
        logits.shape[1],
        z_weight,
        IGNORED=IGNORE_INDEX,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        num_warps=16,
    )
    return log_sums
