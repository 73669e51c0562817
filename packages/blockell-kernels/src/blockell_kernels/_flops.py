"""Lets `torch.utils.flop_counter.FlopCounterMode` count the products of this package's operators.

Counted is what the pattern asks for, 2 N R K B^2 per product, whatever backend computes it and
whatever it computes besides. As in torch's own formulas a multiply-add counts as two, and biases
and activations as nothing.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from blockell_kernels._activated_ops import activated_backward_op, activated_op
from blockell_kernels._mlp_ops import mlp_backward_op, mlp_op, sizes_of
from blockell_kernels._ops import linear_backward_op, linear_op

_COUNTER = "torch.utils.flop_counter"


def _product(t: Tensor, R: int, blocks: int, B: int) -> int:
    """One product with `blocks` blocks in each of R rows; t [..., features] tells the tokens."""
    return 2 * (t.numel() // t.shape[-1]) * R * blocks * B * B


def _weight_blocks(needed: bool, sample: str, num_live: int, C: int) -> int:
    """Blocks per row of the weight's gradient: all of them for the statistics of absent ones."""
    return C if sample == "gradient" else num_live if needed else 0


def _linear(x: Tensor, values: Tensor, *rest: Any, out_val: object = None) -> int:
    R, _, B, _ = values.shape
    return _product(x, R, rest[6], B)


def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor | None,
    col_indices: Tensor,
    order: Tensor | None,
    col_start: Tensor | None,
    C: int,
    B: int,
    row_group: int,
    num_live: int,
    need_input: bool,
    need_values: bool,
    need_bias: bool,
    sample: str,
    *rest: Any,
    out_val: object = None,
) -> int:
    blocks = num_live * need_input + _weight_blocks(need_values, sample, num_live, C)
    return _product(dy, col_indices.shape[0], blocks, B)


def _activated_backward(dy: Tensor, h: Tensor, *rest: Any, out_val: object = None) -> int:
    return _linear_backward(dy, *rest)


def _mlp(*args: Any, out_val: object = None) -> int:
    N, *layers = sizes_of(args)
    return sum(2 * N * R * num_live * B * B for R, _, B, _, num_live in layers)


def _mlp_backward(*args: Any, out_val: object = None) -> int:
    dy, _, h, a, _, cols1, _, _, _, C1, B1, _, live1, sample1 = args[:14]
    cols2, B2, live2, sample2, needs = args[15], args[18], args[20], args[21], args[22]
    need_x, need_values1, need_bias1, need_values2, _ = needs
    R1, R2 = cols1.shape[0], cols2.shape[0]
    need_hidden = need_x or need_values1 or need_bias1 or sample1 != "none"
    need_a = need_values2 or sample2 != "none"
    again = (need_hidden and h is None) or (need_a and a is None and h is None)
    first = live1 * (need_x + again) + _weight_blocks(need_values1, sample1, live1, C1)
    second = live2 * need_hidden + _weight_blocks(need_values2, sample2, live2, R1 * B1 // B2)
    return _product(dy, R1, first, B1) + _product(dy, R2, second, B2)


_FORMULAS = {
    linear_op: _linear,
    linear_backward_op: _linear_backward,
    activated_op: _linear,
    activated_backward_op: _activated_backward,
    mlp_op: _mlp,
    mlp_backward_op: _mlp_backward,
}


def _register(counter: ModuleType) -> None:
    for operator, formula in _FORMULAS.items():
        counter.register_flop_formula(operator.overloadpacket, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when someone imports torch's counter, which would import Triton."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
