"""Other libraries' block-sparse products, where they are installed and take the case.

Legend: R block rows, C block columns, K blocks per row, B tile side, N tokens.

Each function returns a forward product and the tensor that its backward pass differentiates, or
None where there is no backward pass. Where it cannot run, `UnavailableError` says why.
A peer is compared with the dense product before it is timed: a wrong one is left out, by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blockell_format import BlockELLFormat, to_bsr
from blockell_kernels._bench._cases import BenchCase, BenchOperands

Product = tuple[Callable[[], Tensor], Tensor | None]


class UnavailableError(RuntimeError):
    """Why a peer cannot run a case."""


def _checked(case: BenchCase, o: BenchOperands, forward: Callable[[], Tensor]) -> None:
    from blockell_kernels._bench._contenders import off_by

    try:
        with torch.no_grad():
            got = forward()
            want = torch.nn.functional.linear(o.x, o.dense, o.bias)
    except Exception as error:  # whatever a library raises: it does not take the case
        first_line = str(error).strip().split("\n")[0][:200]
        raise UnavailableError(f"{type(error).__name__}: {first_line}") from error
    wrong = off_by(got, want, case.dtype)
    if wrong is not None:
        raise UnavailableError(f"its result is off by {wrong:.2e} of the largest entry")


def _format(o: BenchOperands) -> BlockELLFormat:
    C = o.x.shape[-1] // o.values.shape[-1]
    return BlockELLFormat(o.values.detach(), o.col_indices, C)


def torch_bsr(case: BenchCase, o: BenchOperands) -> Product:
    """torch's BSR layout. It has no gradient for the values of a weight."""
    try:
        bsr = to_bsr(_format(o))
    except (RuntimeError, NotImplementedError) as error:
        raise UnavailableError(str(error)) from error

    def forward() -> Tensor:
        return torch.nn.functional.linear(o.x, bsr, o.bias)

    _checked(case, o, forward)
    return forward, None


def torch_bsr_tuned(case: BenchCase, o: BenchOperands) -> Product:
    """torch's BSR layout after its own tuner, whose shipped table knows the A100 only. Minutes."""
    if not o.x.is_cuda:
        raise UnavailableError("its tuner is for its GPU kernels")
    try:
        meta = importlib.import_module("torch.sparse._triton_ops_meta")
        bsr = to_bsr(_format(o))
        out = torch.nn.functional.linear(o.x, bsr, o.bias).T
        meta.tune_bsr_dense_addmm(out, bsr, o.x.T, beta=1, store=True)  # 1: there is a bias
    except Exception as error:
        raise UnavailableError(f"its tuner failed: {type(error).__name__}: {error}") from error
    return torch_bsr(case, o)


def stk(case: BenchCase, o: BenchOperands) -> Product:
    """STK, the kernels under MegaBlocks."""
    try:
        library: Any = importlib.import_module("stk")
    except ImportError as error:
        raise UnavailableError("the package stanford-stk is not installed") from error
    R, K, B, _ = o.values.shape
    # sorted: its transposed index assumes it; int32: int16 overflows in its offsets
    columns, order = o.col_indices.sort(1)
    rows = torch.arange(R, device=o.x.device)[:, None]
    data = o.values.detach()[rows, order].reshape(R * K, B, B).contiguous()
    data.requires_grad_(case.mode == "training")
    weight = library.Matrix(
        (R * B, o.x.shape[1]),
        data,
        rows.expand(R, K).reshape(-1).int(),
        columns.reshape(-1).int(),
        torch.arange(0, R * K + 1, K, device=o.x.device, dtype=torch.int32),
    )

    def forward() -> Tensor:
        product: Tensor = library.ops.dds(o.x, weight.t())
        return product + o.bias

    _checked(case, o, forward)
    return forward, data


def cusparse(case: BenchCase, o: BenchOperands) -> Product:
    """cuSPARSE's Blocked-ELL product, through ctypes. It has no backward pass."""
    from blockell_kernels._bench._cusparse import BlockedEll

    columns, order = o.col_indices.sort(1)
    rows = torch.arange(columns.shape[0], device=o.x.device)[:, None]
    product = BlockedEll(o.values.detach()[rows, order], columns, o.x.detach())

    def forward() -> Tensor:
        return product() + o.bias

    _checked(case, o, forward)
    return forward, None


PEERS: dict[str, Callable[[BenchCase, BenchOperands], Product]] = {
    "torch BSR": torch_bsr,
    "torch BSR, tuned": torch_bsr_tuned,
    "STK": stk,
    "cuSPARSE": cusparse,
}
