# mypy: ignore-errors
"""Triton kernels that treat the blocks of many layers in one launch.

Legend: R block rows, K slots per row, k live ones, B tile side, E = B*B elements of a block.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from cms_topology._addresses import address_table

ELEMENTS = 4096
"""Of a tensor, that a program holds at a time: some small blocks or a piece of a large one."""
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _block_norms(
    table_ptr,  # int64 [layers, 3]: address of [R, K, E], R*K, first entry in the result
    norms_ptr,  # float32, of all layers
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
        tl.store(norms_ptr + tl.load(row + 2) + slot, tl.sqrt(tl.sum(total, 1)), slot < count)


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


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """See `block_norms`; contiguous tensors of one dtype and tile side on one GPU."""
    B = tensors[0].shape[-1]
    piece = min(B * B, ELEMENTS)
    slots = ELEMENTS // piece
    counts = [tensor.shape[0] * tensor.shape[1] for tensor in tensors]
    flat = torch.empty(sum(counts), device=tensors[0].device)
    parts = flat.split(counts)
    rows = tuple(
        (tensor.data_ptr(), count, part.storage_offset())
        for tensor, count, part in zip(tensors, counts, parts, strict=True)
    )
    _block_norms[(triton.cdiv(max(counts), slots), len(tensors))](
        address_table(rows, flat.device),
        flat,
        E=B * B,
        SLOTS=slots,
        PIECE=piece,
        KIND=KINDS[tensors[0].dtype],
    )
    return [part.view(t.shape[:2]) for part, t in zip(parts, tensors, strict=True)]


def clear(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """See `clear_blocks`; contiguous tensors of one dtype and tile side on one GPU."""
    B = tensors[0].shape[-1]
    rows = tuple(
        (tensor.data_ptr(), mask.data_ptr(), mask.numel(), mask.shape[1], tensor.shape[1])
        for tensor, mask in zip(tensors, masks, strict=True)
    )
    _clear_blocks[(max(mask.numel() for mask in masks), len(tensors))](
        address_table(rows, tensors[0].device),
        E=B * B,
        PIECE=min(B * B, ELEMENTS),
        KIND=KINDS[tensors[0].dtype],
    )
    increment_version(tensors)  # so that autograd notices, as after an operator of torch
