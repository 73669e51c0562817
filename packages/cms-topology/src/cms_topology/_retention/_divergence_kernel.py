# mypy: ignore-errors
"""A Triton kernel that compares answers with those that were kept, reading the logits once.

Legend: N answers, V classes, k classes kept of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Classes that a program holds at a time."""


@triton.jit
def _divergences(
    logits_ptr,  # [positions, V]
    positions_ptr,  # int64 [N]
    classes_ptr,  # int64 [N, k]
    log_probs_ptr,  # float32 [N, k]
    found_ptr,  # float64 [N], written
    V,
    k,
    limit,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,  # k or more
):
    answer = tl.program_id(0)
    row_ptr = logits_ptr + tl.load(positions_ptr + answer) * V
    # -inf would make nan of classes that are excluded by -inf
    most = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + i, i < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.exp(x - larger)
        most = larger
    top = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - top), 0).to(tl.float64)
    log_total = top.to(tl.float64) + tl.log(total)
    i = tl.arange(0, KEPT)
    at = answer.to(tl.int64) * k + i
    then = tl.load(log_probs_ptr + at, i < k, other=0.0).to(tl.float64)
    kept = tl.load(row_ptr + tl.load(classes_ptr + at, i < k, other=0), i < k, other=0.0)
    now = kept.to(tl.float64) - log_total
    p = tl.where(i < k, tl.exp(then), 0.0)
    q = tl.where(i < k, tl.exp(now), 0.0)
    inside = tl.sum(tl.where(i < k, p * (then - now), 0.0), 0)
    p = tl.maximum(1.0 - tl.sum(p, 0), 1e-12)
    q = tl.maximum(1.0 - tl.sum(q, 0), 1e-12)
    found = inside + p * tl.log(p / q)
    tl.store(found_ptr + answer, tl.where(found > limit, limit, found))  # nan stays


def divergences(
    logits: Tensor, positions: Tensor, classes: Tensor, log_probs: Tensor, limit: float
) -> Tensor:
    """See `Probes.divergence`; contiguous logits [positions, V] -> float64 [N]."""
    N, k = classes.shape
    found = torch.empty(N, dtype=torch.float64, device=logits.device)
    V = logits.shape[1]
    _divergences[(N,)](
        logits,
        positions,
        classes,
        log_probs,
        found,
        V,
        k,
        limit,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)),
        KEPT=triton.next_power_of_2(k),
        num_warps=8 if V >= BLOCK else 4,
    )
    return found
