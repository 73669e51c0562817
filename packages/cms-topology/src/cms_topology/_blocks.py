"""What is done to the blocks of many layers at once: their norms, and clearing some of them.

Legend: R block rows, K slots per row, k live ones, B tile side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

_KINDS = frozenset((torch.float32, torch.bfloat16, torch.float16))


def block_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Frobenius norm of every block: [R, K, B, B] each -> float32 [R, K] each."""
    return finite_block_norms(tensors)[0]


def finite_block_norms(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """`block_norms`, and whether all of them are finite, a 0-d bool."""
    norms: dict[int, Tensor] = {}
    verdicts = []
    for members, by_kernel in _launches(tensors):
        chosen = [tensors[i] for i in members]
        if by_kernel is not None:
            found, finite = by_kernel.norms(chosen)
        else:
            found = [_norms(tensor) for tensor in chosen]
            finite = all_finite(found)
        norms.update(zip(members, found, strict=True))
        verdicts.append(finite)
    return [norms[i] for i in range(len(tensors))], all_of(verdicts)


def clear_blocks(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero blocks in place.

    Args:
        tensors: [R, K, B, B] each.
        masks: bool [R, k] each, k <= K: True for the slots to clear.
    """
    for members, by_kernel in _launches(tensors):
        chosen, theirs = [tensors[i] for i in members], [masks[i] for i in members]
        if by_kernel is not None:
            by_kernel.clear(chosen, [mask.contiguous() for mask in theirs])
            continue
        for tensor, mask in zip(chosen, theirs, strict=True):
            tensor[:, : mask.shape[1]].masked_fill_(mask[:, :, None, None], 0.0)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """0-d bool: are all entries of all tensors finite? No host synchronisation."""
    totals = torch._foreach_norm(list(tensors), float("inf"))
    device = totals[0].device
    return torch.stack([total.to(device) for total in totals]).isfinite().all()


def all_of(verdicts: Sequence[Tensor]) -> Tensor:
    """The conjunction of 0-d bools, wherever they are."""
    if len(verdicts) == 1:
        return verdicts[0]
    return torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all()


def kernels_for(*tensors: Tensor) -> bool:
    """Whether Triton kernels read these: on a GPU, contiguous, aligned, at most 32 bits wide."""
    for t in tensors:
        if not t.is_cuda or t.dtype not in _KINDS or t.data_ptr() % 16 or not t.is_contiguous():
            return False
    return kernels() is not None


@functools.cache
def kernels() -> ModuleType | None:
    """`_block_kernels`; None without Triton."""
    try:
        from cms_topology import _block_kernels
    except ImportError:  # no Triton on this platform
        return None
    return _block_kernels


def _norms(tensor: Tensor) -> Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor, dim=(2, 3), dtype=wide).float()


def _launches(tensors: Sequence[Tensor]) -> list[tuple[list[int], ModuleType | None]]:
    """Positions of the tensors that one launch can treat, and with what; None: one by one."""
    found: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike = (
            (tensor.device, tensor.dtype, tensor.shape[-1])
            if kernels_for(tensor)
            else tensor.device  # all_finite takes one device's tensors together
        )
        found.setdefault(alike, []).append(i)
    return [
        (members, kernels() if isinstance(alike, tuple) else None)
        for alike, members in found.items()
    ]
