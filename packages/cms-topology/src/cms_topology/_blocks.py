"""What is done to the blocks of many layers at once: their norms, and clearing some of them.

Legend: R block rows, K slots per row, k live ones, B tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


def block_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Frobenius norm of every block: [R, K, B, B] each -> float32 [R, K] each."""
    norms: list[Tensor | None] = [None] * len(tensors)
    for members, kernels in _launches(tensors):
        chosen = [tensors[i] for i in members]
        found = kernels.norms(chosen) if kernels is not None else map(_norms, chosen)
        for i, norm in zip(members, found, strict=True):
            norms[i] = norm
    return [norm for norm in norms if norm is not None]


def clear_blocks(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero blocks in place.

    Args:
        tensors: [R, K, B, B] each.
        masks: bool [R, k] each, k <= K: True for the slots to clear.
    """
    for members, kernels in _launches(tensors):
        chosen, theirs = [tensors[i] for i in members], [masks[i] for i in members]
        if kernels is not None:
            kernels.clear(chosen, [mask.contiguous() for mask in theirs])
            continue
        for tensor, mask in zip(chosen, theirs, strict=True):
            tensor[:, : mask.shape[1]].masked_fill_(mask[:, :, None, None], 0.0)


def kernels_for(*tensors: Tensor) -> bool:
    """Whether Triton kernels read these: on a GPU, contiguous, aligned, at most 32 bits wide."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return all(
        t.is_cuda and t.is_contiguous() and t.dtype in kinds and t.data_ptr() % 16 == 0
        for t in tensors
    ) and (_kernels() is not None)


def _norms(tensor: Tensor) -> Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor, dim=(2, 3), dtype=wide).float()


def _kernels() -> ModuleType | None:
    try:
        from cms_topology import _block_kernels
    except ImportError:  # no Triton on this platform
        return None
    return _block_kernels


def _launches(tensors: Sequence[Tensor]) -> list[tuple[list[int], ModuleType | None]]:
    """Positions of the tensors that one launch can treat, and with what; None: one by one."""
    found: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike = (tensor.device, tensor.dtype, tensor.shape[-1]) if kernels_for(tensor) else None
        found.setdefault(alike, []).append(i)
    return [
        (members, _kernels() if alike is not None else None) for alike, members in found.items()
    ]
