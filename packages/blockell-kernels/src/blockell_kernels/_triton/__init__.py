"""Block-sparse GPU kernels in Triton, behind the backend seam.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels import _tuning
from blockell_kernels._backends import Backend, Case, Direction, Pattern, Verdict

# Under another name: of a submodule's, importing that would make it the submodule.
from blockell_kernels._gluon import _halves as _by_halves
from blockell_kernels._gluon import _whole, _whole_values
from blockell_kernels._gpu import TILE_SIZES
from blockell_kernels._triton import (
    _blocks,
    _few_tokens,
    _forward,
    _grad_input,
    _grad_values,
    _walk,
)
from blockell_kernels._triton._device import INTERPRETED, dot_precision
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._rule import arithmetic, beats_copied, takes_whole, verdict
from blockell_kernels._triton._tiling import Tiling
from blockell_kernels._triton._tilings import tiling_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonBackend(Backend):
    name = "triton"

    def unavailable(self) -> str | None:
        if INTERPRETED or torch.cuda.is_available():
            return None
        return "no CUDA device is visible to torch"

    def unsupported(self, case: Case) -> str | None:
        if case.device.type != "cuda" and not INTERPRETED:
            return f"its kernels do not run on device type {case.device.type!r}"
        if case.B not in TILE_SIZES:
            return f"tile_size (={case.B}) is not one of {TILE_SIZES}"
        if case.dtype not in DTYPES:
            return f"dtype (={case.dtype}) is not float32, float16 or bfloat16"
        return None

    def verdict(self, case: Case) -> Verdict:
        tuned = _tuning.verdict(case, arithmetic(case))
        if tuned is not None:
            return tuned
        return verdict(case)

    def arithmetic(self, case: Case) -> str | None:
        precision = dot_precision(case.dtype, case.device)
        if precision == "ieee":
            return None
        if precision == "tf32":
            return "float32 operands are multiplied as TF32, which torch allows"
        way = (
            "3xTF32"
            if _by_halves.chosen(case) is None
            else "three float16 products of two halves each"
        )
        return f"float32 operands are multiplied as {way}, accurate to 1e-6"

    def beats_copied(self, case: Case) -> bool:
        return _tuning.verdict(case, arithmetic(case)) is not None or beats_copied(case)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        return _product(x, values, bias, pattern)

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return _input_gradient(dy, values, pattern)

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        return _values_gradient(dy, x, pattern)

    def block_grad_norms(self, dy: Tensor, x: Tensor, B: int) -> Tensor:
        return _blocks.block_norms_sq(dy, x, B)

    def grad_values_and_norms(
        self, dy: Tensor, x: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        return self.grad_values(dy, x, pattern), self.block_grad_norms(dy, x, pattern.B)


@replayed
def _product(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    case = _case("forward", x, pattern)
    if takes_whole(case) and _whole.takes(x, values, pattern.B):
        return _whole.product(x, values, bias, pattern, forward=True)
    if (walk := _walk.walk_for(case)) is not None and _walk.readable(x):
        return _walk.forward(x, values, bias, pattern, walk)
    if (halves := _by_halves.chosen(case, x, values)) is not None:
        return _forward.forward(x, values, bias, pattern, halves)
    if (strip := _few_tokens.strip_for(case)) is not None:
        return _few_tokens.forward(x, values, bias, pattern, strip)
    return _forward.forward(x, values, bias, pattern, _tiling(case))


@replayed
def _input_gradient(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    case = _case("grad_input", dy, pattern)
    if takes_whole(case) and _whole.takes(dy, values, pattern.B):
        return _whole.product(dy, values, None, pattern, forward=False)
    if (walk := _walk.walk_for(case)) is not None and _walk.readable(dy):
        return _walk.grad_input(dy, values, pattern, walk)
    if (halves := _by_halves.chosen(case, dy, values)) is not None:
        return _grad_input.grad_input(dy, values, pattern, halves)
    if (strip := _few_tokens.strip_for(case)) is not None:
        return _few_tokens.grad_input(dy, values, pattern, strip)
    return _grad_input.grad_input(dy, values, pattern, _tiling(case))


@replayed
def _values_gradient(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    case = _case("grad_values", x, pattern)
    if takes_whole(case) and _whole_values.takes(dy, x, pattern.B):
        return _whole_values.grad_values(dy, x, pattern)
    if (walk := _walk.walk_for(case)) is not None and _walk.readable(dy, x):
        return _walk.grad_values(dy, x, pattern, walk)
    if (halves := _by_halves.chosen(case, dy, x)) is not None:
        return _grad_values.grad_values(dy, x, pattern, halves)
    if (strip := _few_tokens.strip_for(case)) is not None:
        return _few_tokens.grad_values(dy, x, pattern, strip)
    return _grad_values.grad_values(dy, x, pattern, _tiling(case))


def _tiling(case: Case) -> Tiling:
    """Of a large weight 128 tokens are many: 256 with the tiling of 512 take two thirds."""
    large = case.R * case.C * case.B**2 >= _few_tokens.SMALL_WEIGHT
    return tiling_for(case._replace(N=512) if large and 128 < case.N < 512 else case)


def _case(direction: Direction, operand: Tensor, pattern: Pattern) -> Case:
    return Case(
        direction,
        operand.device,
        operand.dtype,
        operand.shape[0],
        pattern.R,
        pattern.C,
        pattern.num_live,
        pattern.B,
        pattern.row_group,
    )


BACKEND = TritonBackend()
