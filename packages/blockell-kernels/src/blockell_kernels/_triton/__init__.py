"""Block-sparse GPU kernels in Triton, behind the backend seam.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels import _tuning
from blockell_kernels._backends import DIRECTIONS, Backend, Case, Pattern, Verdict
from blockell_kernels._gpu import TILE_SIZES
from blockell_kernels._triton import _blocks, _ways
from blockell_kernels._triton._device import INTERPRETED, dot_precision
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._rule import arithmetic, beats_copied, loses_to_one_copy, verdict

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

    def details(self, case: Case) -> str:
        way = _ways.way_of(case)
        words = f"by {way.name}, in {way.cost}"
        precision = dot_precision(case.dtype, case.device)
        if precision == "ieee":
            return words
        if precision == "tf32":
            return f"{words}; float32 operands are multiplied as TF32, which torch allows"
        products = "three float16 products of two halves each" if way is _ways.HALVES else "3xTF32"
        return f"{words}; float32 operands are multiplied as {products}, accurate to 1e-6"

    def beats_copied(self, case: Case, beside: bool = False) -> bool:
        return _tuning.verdict(case, arithmetic(case)) is not None or beats_copied(case, beside)

    def loses_to_one_copy(self, case: Case) -> bool:
        kind = arithmetic(case)
        both = (case._replace(direction=direction) for direction in DIRECTIONS[:2])
        return not any(_tuning.verdict(c, kind) for c in both) and loses_to_one_copy(case)

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


_product = replayed(_ways.forward)
_input_gradient = replayed(_ways.grad_input)
_values_gradient = replayed(_ways.grad_values)
BACKEND = TritonBackend()
