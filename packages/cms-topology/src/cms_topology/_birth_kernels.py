# mypy: ignore-errors
"""A Triton kernel that corrects the steps of young blocks, and reads only the ages of others.

Legend: R block rows, K slots per row (live ones first), B tile side, E = B*B elements of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Of the values, at most, that a program looks after: some small blocks or a piece of a large."""


@triton.jit
def _correct_young(
    values_ptr,  # [R, K, E]
    mean_ptr,  # [R, K, E]
    square_ptr,  # [R, K, E]
    age_ptr,  # int32 [R, K]
    step_ptr,  # float32, steps of the whole parameter
    last_ptr,  # float32, the same at the last call
    rate_ptr,  # float32, or None
    rate,  # the learning rate without rate_ptr
    beta1,
    beta2,
    eps,
    grown_up,
    slots,  # R*K
    K,
    live,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
):
    first = tl.program_id(0) * SLOTS
    t = tl.load(step_ptr)
    slot = first + tl.arange(0, SLOTS)
    there = (slot < slots) & (slot % K < live)
    age = tl.load(age_ptr + slot, there, other=2**30).to(tl.float32)
    # a gradient scaler may have skipped the step: then there is nothing to correct
    youngest = tl.where(t > tl.load(last_ptr), tl.min(age, 0), 2.0**30)
    limit = tl.minimum(t, grown_up)
    if youngest < limit:
        if rate_ptr is not None:
            rate = tl.load(rate_ptr).to(tl.float32)
        for i in range(SLOTS):
            one = first + i
            inside = (one < slots) & (one % K < live)
            its_age = tl.load(age_ptr + one, inside, other=2**30).to(tl.float32)
            its_age = tl.maximum(tl.minimum(its_age, t), 1.0)
            if its_age < limit:
                element = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
                at = one.to(tl.int64) * E + element
                mean = tl.load(mean_ptr + at).to(tl.float32)
                root = tl.sqrt(tl.load(square_ptr + at).to(tl.float32))
                log1, log2 = tl.log(beta1), tl.log(beta2)
                made = mean / (1.0 - tl.exp(t * log1))
                made /= root / tl.sqrt(1.0 - tl.exp(t * log2)) + eps
                meant = mean / (1.0 - tl.exp(its_age * log1))
                meant /= root / tl.sqrt(1.0 - tl.exp(its_age * log2)) + eps
                value = tl.load(values_ptr + at).to(tl.float32) + rate * (made - meant)
                tl.store(values_ptr + at, value.to(values_ptr.dtype.element_ty))


def correct_young(
    values: Tensor,
    mean: Tensor,
    square: Tensor,
    age: Tensor,
    live: int,
    step: Tensor,
    last: Tensor,
    rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grown_up: float,
) -> None:
    """See `NewbornStepCorrection`; contiguous tensors, `values` [R, K, B, B] changed in place.

    `step` and `last` float32: Adam's steps, and those at the last call. A `rate` that is a tensor
    is read on the device.
    """
    R, K, B, _ = values.shape
    piece = min(B * B, ELEMENTS)
    slots = max(1, ELEMENTS // (B * B))
    in_memory = isinstance(rate, Tensor)
    _correct_young[(triton.cdiv(R * K, slots), B * B // piece)](
        values,
        mean,
        square,
        age,
        step,
        last,
        rate if in_memory else None,
        0.0 if in_memory else rate,
        *betas,
        eps,
        grown_up,
        R * K,
        K,
        live,
        E=B * B,
        SLOTS=slots,
        PIECE=piece,
    )


def takes(values: Tensor, *others: Tensor) -> bool:
    """Whether the kernel reads these tensors."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return all(t.is_contiguous() and t.dtype in kinds for t in (values, *others))
