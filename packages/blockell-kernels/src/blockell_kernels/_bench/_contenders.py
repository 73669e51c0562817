"""Who is measured, and the gate that ours passes before it is timed.

Legend: R block rows, C block columns, K blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockell_format import BlockELLFormat, to_bsr
from blockell_kernels import _reference as reference
from blockell_kernels._bench._cases import BenchCase, BenchOperands
from blockell_kernels._functional import block_ell_linear

Step = Callable[[], object]
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GATE_TOKENS, GATE_ROW_GROUPS = 64, 3


def _step(case: BenchCase, forward: Callable[[], Tensor], o: BenchOperands, weight: Tensor) -> Step:
    """One timed step. Gradients are returned and dropped, as an optimizer would consume them."""
    if case.mode == "forward":

        def step() -> object:
            with torch.no_grad():
                return forward()

        return step
    inputs = (o.x, weight, o.bias)
    return lambda: torch.autograd.grad(forward(), inputs, o.dy)


def contenders(case: BenchCase, o: BenchOperands, backends: tuple[str, ...]) -> dict[str, Step]:
    """Name -> step. Dense first: it is what the others are compared with."""
    linear = torch.nn.functional.linear
    steps = {
        "nn.Linear": _step(case, lambda: linear(o.x, o.dense, o.bias), o, o.dense),
        "masked dense": _step(case, lambda: linear(o.x, o.dense * o.mask, o.bias), o, o.dense),
    }
    if case.mode == "forward":  # torch has no gradient for the values of a BSR weight
        try:
            bsr = _bsr(o)
            linear(o.x[:1], bsr, o.bias)
            steps["torch BSR"] = _step(case, lambda: linear(o.x, bsr, o.bias), o, o.dense)
        except (RuntimeError, NotImplementedError):
            pass  # not on this device, dtype or tile
    for backend in backends:

        def ours(backend: str = backend) -> Tensor:
            return block_ell_linear(
                o.x, o.values, o.col_indices, o.bias, row_group=case.row_group, backend=backend
            )

        steps[f"ours ({backend})"] = _step(case, ours, o, o.values)
    return steps


def _bsr(o: BenchOperands) -> Tensor:
    C = o.x.shape[-1] // o.values.shape[-1]
    return to_bsr(BlockELLFormat(o.values.detach(), o.col_indices, C))


def gate(case: BenchCase, o: BenchOperands, backend: str) -> str | None:
    """What is wrong with ours on this case, by the float64 reference; None if nothing.

    The output and the input's gradient are compared on the first and last tokens, the weight's
    gradient on a few row groups: each slice is exact, and the reference loops over blocks.
    """
    with torch.enable_grad():
        x, values, bias = (t.detach().requires_grad_() for t in (o.x, o.values, o.bias))
        y = block_ell_linear(
            x, values, o.col_indices, bias, row_group=case.row_group, backend=backend
        )
        got_dx, got_dv, got_db = torch.autograd.grad(y, (x, values, bias), o.dy)
    N, R, C, B = case.tokens, values.shape[0], case.in_features // case.tile, case.tile
    some = torch.tensor(sorted({*range(N)[:GATE_TOKENS], *range(N)[-GATE_TOKENS:]}))
    some = some.to(case.device)
    G = case.row_group
    groups = sorted({0, R // G // 2, R // G - 1})[:GATE_ROW_GROUPS]
    rows = torch.cat([torch.arange(g * G, (g + 1) * G) for g in groups]).to(case.device)

    x64, v64, b64, dy64 = (t.detach().double() for t in (o.x, o.values, o.bias, o.dy))
    dy_rows = dy64.view(N, R, B)[:, rows].reshape(N, -1)
    pairs = {
        "y": (y.detach()[some], reference.forward(x64[some], v64, o.col_indices, b64)),
        "dx": (got_dx[some], reference.grad_input(dy64[some], v64, o.col_indices, C)),
        "dvalues": (got_dv[rows], reference.grad_values(dy_rows, x64, o.col_indices[rows], B)),
        "dbias": (got_db, reference.grad_bias(dy64)),
    }
    for name, (got, want) in pairs.items():
        scale = float(want.abs().max())
        error = float((got.double() - want).abs().max()) / (scale or 1.0)
        if not error <= RTOL[case.dtype]:
            return f"{name} is off by {error:.2e} of its largest entry"
    return None
