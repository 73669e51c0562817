"""Where a projection's work beside its products can be done in one pass over memory each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from cms_topology._retention._units import ProtectedWeight

if TYPE_CHECKING:
    from cms_topology._retention._passes_kernel import Weights

MOST_UNITS = 65_535
"""Second dimension of a grid."""


@functools.cache
def kernels() -> ModuleType | None:
    """`_passes_kernel`; None without Triton."""
    try:
        from cms_topology._retention import _passes_kernel
    except ImportError:
        return None
    return _passes_kernel


def reachable(
    weights: Sequence[ProtectedWeight], still: Sequence[torch.Tensor | None]
) -> Weights | None:
    """Weights of one shape as the kernels find them; None where torch has to fetch them.

    That is on a CPU, without Triton, in half or double precision, and for matrices that are cut in
    another way than into rows.

    Args:
        weights: of one shape, dtype and device.
        still: per weight, see `ProtectedWeight.still`.
    """
    found = kernels() if weights[0].parameter.is_cuda else None
    return None if found is None else where(weights, still, found)


def where(
    weights: Sequence[ProtectedWeight], still: Sequence[torch.Tensor | None], by: ModuleType
) -> Weights | None:
    """`reachable`, whatever the device."""
    parameters = [weight.parameter.detach() for weight in weights]
    units = weights[0].shape[0]
    places = {_place(weight) for weight in weights}
    place = places.pop()
    plain = all(
        p.dtype == torch.float32 and p.is_contiguous() and p.data_ptr() % 16 == 0
        for p in parameters
    )
    if not plain or places or place is None or len(weights) * units > MOST_UNITS:
        return None
    reach: Weights = by.Weights(parameters, units, *place, still)
    return reach


def _place(weight: ProtectedWeight) -> tuple[int, int] | None:
    """Slots per row and tile side; None if a unit's rows do not follow one another."""
    if weight.layer is not None:
        return weight.layer.K, weight.layer.B
    return None if weight.memory.layout.inputs_first else (weight.shape[2], 1)
