"""Triangular systems of many chunks at once: (I + L) X = Y.

Legend: b tokens of a chunk, D columns.
"""

from typing import Any

import torch
from torch import Tensor

from titanmac_integration._layers._triton import has_triton

LARGEST = 128
"""Tokens of a chunk that the kernel inverts."""


def solve_unit_lower(lower: Tensor, right: Tensor) -> Tensor:
    """X of (I + L) X = Y: ``lower`` L [..., b, b], zero above and on the diagonal; Y [..., b, D].

    Row t of the result depends on rows up to t only. On a GPU by the inverse, which one kernel
    makes by substitution; elsewhere by torch's triangular solver.
    """
    if _on_gpu(lower):
        from ._solve_kernels import invert_unit_lower

        with torch.no_grad():
            inverse = invert_unit_lower(lower.detach())
        solution: Tensor = _Solve.apply(lower, right, inverse)
        return solution
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower + unit, right, upper=False, unitriangular=True)


def _on_gpu(lower: Tensor) -> bool:
    small = lower.is_cuda and lower.dtype == torch.float32 and lower.shape[-1] <= LARGEST
    return small and not torch.compiler.is_compiling() and has_triton()


class _Solve(torch.autograd.Function):
    """Z Y, differentiated as the solution that it is: d X = Z (d Y - d L X) with Z = (I + L)^-1."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, right: Tensor, inverse: Tensor) -> Tensor:
        solution = inverse @ right
        ctx.save_for_backward(lower, inverse, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        lower, inverse, solution = ctx.saved_tensors
        # in operations that can be differentiated in turn
        grad_right = _Solve.apply(lower.mT, grad, inverse.mT)
        return -(grad_right @ solution.mT), grad_right, None
