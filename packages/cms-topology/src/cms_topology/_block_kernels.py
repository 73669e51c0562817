# mypy: ignore-errors
"""Triton kernels that treat the blocks of many layers in one launch.

Legend: R block rows, K slots per row, k live ones, B tile side, E = B*B elements of a block.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from cms_topology._addresses import address_table
from cms_topology._devices import on

ELEMENTS = 4096
"""Of a tensor, that a program holds at a time: some small blocks or a piece of a large one."""
BLOCK = 256
"""Slots whose averages a program moves."""
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _block_norms(
    table_ptr,  # int64 [layers, 3]: address of [R, K, E], R*K, first entry in the result
    norms_ptr,  # float32, of all layers
    finite_ptr,  # int8, 1 at first, and so it stays if all norms are finite
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    KIND: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * 3
    first = tl.program_id(0) * SLOTS
    count = tl.load(row + 1).to(tl.int32)
    if first < count:
        blocks_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(KIND)), 16)
        slot = first + tl.arange(0, SLOTS)
        at = slot.to(tl.int64)[:, None] * E + tl.arange(0, PIECE)[None, :]
        there = (slot < count)[:, None]
        total = tl.zeros((SLOTS, PIECE), tl.float32)
        for piece in tl.static_range(0, E, PIECE):
            x = tl.load(blocks_ptr + at + piece, there, other=0.0).to(tl.float32)
            total += x * x
        norm = tl.sqrt(tl.sum(total, 1))
        tl.store(norms_ptr + tl.load(row + 2) + slot, norm, slot < count)
        odd = (slot < count) & ~(norm < float("inf"))
        if tl.max(odd.to(tl.int32), 0) > 0:
            tl.store(finite_ptr, 0)


@triton.jit
def _advance(
    table_ptr,  # int64 [layers, 5]: addresses of ema, weight, score (float32), age (int32); R*K
    finite_ptr,  # bool
    rise,  # 1 - decay
    SMALL: tl.constexpr,  # rise < 0.5
    BLOCK: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * 5
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.load(row + 4).to(tl.int32)
    if tl.load(finite_ptr):
        ema_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        weight_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        score_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        age_ptr = tl.load(row + 3).to(tl.pointer_type(tl.int32))
        ema, weight = tl.load(ema_ptr + at, there), tl.load(weight_ptr + at, there)
        score = tl.load(score_ptr + at, there)
        if SMALL:  # torch.lerp's two forms: the first exact at 0, the second at 1
            ema = ema + rise * (score - ema)
            weight = weight + rise * (1.0 - weight)
        else:
            ema = score - (score - ema) * (1.0 - rise)
            weight = 1.0 - (1.0 - weight) * (1.0 - rise)
        tl.store(ema_ptr + at, ema, there)
        tl.store(weight_ptr + at, weight, there)
        tl.store(age_ptr + at, tl.load(age_ptr + at, there) + 1, there)


@triton.jit
def _clear_blocks(
    table_ptr,  # int64 [tensors, 5]: addresses of [R, K, E] and of bool [R, k], R*k, k, K
    E: tl.constexpr,
    PIECE: tl.constexpr,
    KIND: tl.constexpr,
):
    row = table_ptr + tl.program_id(1) * 5
    slot = tl.program_id(0)
    if slot < tl.load(row + 2):
        mask_ptr = tl.load(row + 1).to(tl.pointer_type(tl.int8))
        if tl.load(mask_ptr + slot) != 0:
            live = tl.load(row + 3).to(tl.int32)
            block = (slot // live) * tl.load(row + 4) + slot % live
            blocks_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(KIND)), 16)
            at = block * E + tl.arange(0, PIECE)
            for piece in tl.static_range(0, E, PIECE):
                tl.store(blocks_ptr + at + piece, tl.zeros((PIECE,), KIND))


def norms(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """See `finite_block_norms`; contiguous tensors of one dtype and tile side on one GPU."""
    counts = [tensor.shape[0] * tensor.shape[1] for tensor in tensors]
    flat = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    finite = torch.ones((), dtype=torch.int8, device=flat.device)
    addresses = [tensor.data_ptr() for tensor in tensors]
    starts = list(itertools.accumulate(counts, initial=0))[:-1]
    rows = tuple(zip(addresses, counts, starts, strict=True))
    launch_norms(rows, flat, finite, tensors[0].dtype, tensors[0].shape[-1])
    parts = zip(flat.split(counts), tensors, strict=True)
    return [part.view(t.shape[:2]) for part, t in parts], finite.view(torch.bool)


def launch_norms(
    rows: tuple[tuple[int, ...], ...], flat: Tensor, finite: Tensor, dtype: torch.dtype, B: int
) -> None:
    """Address, number of blocks and first place in `flat` of tensors of `dtype`; see `norms`."""
    piece = min(B * B, ELEMENTS)
    slots = ELEMENTS // piece
    most = max(row[1] for row in rows)
    with on(flat.device):
        _block_norms[(triton.cdiv(most, slots), len(rows))](
            address_table(rows, flat.device),
            flat,
            finite,
            E=B * B,
            SLOTS=slots,
            PIECE=piece,
            KIND=KINDS[dtype],
        )


def advance(
    state: Sequence[tuple[Tensor, Tensor, Tensor]],
    scores: Sequence[Tensor],
    finite: Tensor,
    decay: float,
) -> None:
    """See `update_averages`; contiguous tensors on one GPU: emas, weights, ages of every layer."""
    launch_advance(rows_to_advance(state, scores), finite, decay)


def rows_to_advance(
    state: Sequence[tuple[Tensor, Tensor, Tensor]], scores: Sequence[Tensor]
) -> tuple[tuple[int, ...], ...]:
    """What `launch_advance` is told about the tensors of `advance`."""
    return tuple(
        (ema.data_ptr(), weight.data_ptr(), score.data_ptr(), age.data_ptr(), age.numel())
        for (ema, weight, age), score in zip(state, scores, strict=True)
    )


def launch_advance(rows: tuple[tuple[int, ...], ...], finite: Tensor, decay: float) -> None:
    """`advance` of the tensors that stand at these addresses."""
    most = max(row[4] for row in rows)
    rise = 1.0 - decay
    with on(finite.device):
        _advance[(triton.cdiv(most, BLOCK), len(rows))](
            address_table(rows, finite.device), finite, rise, SMALL=rise < 0.5, BLOCK=BLOCK
        )


def clear(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """See `clear_blocks`; contiguous tensors of one dtype and tile side on one GPU."""
    B = tensors[0].shape[-1]
    rows = tuple(
        (tensor.data_ptr(), mask.data_ptr(), mask.numel(), mask.shape[1], tensor.shape[1])
        for tensor, mask in zip(tensors, masks, strict=True)
    )
    device = tensors[0].device
    with on(device):
        _clear_blocks[(max(mask.numel() for mask in masks), len(tensors))](
            address_table(rows, device),
            E=B * B,
            PIECE=min(B * B, ELEMENTS),
            KIND=KINDS[tensors[0].dtype],
        )
    increment_version(tensors)  # so that autograd notices, as after an operator of torch
