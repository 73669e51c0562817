"""The seam between the operator and the code that computes it.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

A *backend* is one object with a `name` and functions over 2-D operands of one dtype on one device
(`Backend` below states the shapes): the three products, and norms of blocks. Operands have been
validated; `pattern` carries everything known about the sparsity pattern. There are four backends:

| name      | module       | runs on                       | what it is                            |
|-----------|--------------|-------------------------------|---------------------------------------|
| reference | `_reference` | any device, any float dtype   | visible loops; the ground truth       |
| dense     | `_dense`     | any device                    | scatter into a dense buffer, one GEMM |
| gathered  | `_cpu`       | CPU                           | gather x per row group, one GEMM each |
| triton    | `_triton`    | CUDA (CPU in the interpreter) | block-sparse GPU kernels              |

How a backend plugs in: its module exposes `BACKEND`, an instance of a `Backend` subclass; the
module is imported on first use, never at package import. `unavailable()` says why it cannot run on
this machine (None: it can), `unsupported(case)` why it cannot run this case, and `verdict(case)`
whether it beats the dense backend there, and by what evidence. `select(case, requested)` puts the
three together, per direction: with "auto", each device type has one sparse backend (`SPARSE_ON`),
taken where it is available, supports the case and wins; otherwise the dense backend, whose product
is `torch.nn.Linear`'s, after the weight was put together. A request that cannot be followed falls
back to "auto" with one warning.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blockell_kernels._gpu import gpu_blocks

Direction = Literal["forward", "grad_input", "grad_values"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_values")
BACKEND_NAMES = ("auto", "triton", "gathered", "dense", "reference")
ENV_VAR = "BLOCKELL_BACKEND"

_MODULES = {
    "reference": "blockell_kernels._reference",
    "dense": "blockell_kernels._dense",
    "gathered": "blockell_kernels._cpu",
    "triton": "blockell_kernels._triton",
}
MAX_LOOKED_THROUGH = 2**25
"""Entries times columns up to which one launch indexes the columns faster than sorting does."""
SPARSE_ON = {"cpu": "gathered", "cuda": "triton"}


class Case(NamedTuple):
    """What a choice of backend may depend on. Hashable: choices are cached."""

    direction: Direction
    device: torch.device
    dtype: torch.dtype
    N: int
    R: int
    C: int
    K: int  # live blocks per row
    B: int
    row_group: int

    @property
    def density(self) -> float:
        return self.K / self.C


class Pattern(NamedTuple):
    """The sparsity pattern of one call.

    `col_indices` is int32 [R, slots], the live slots first (`num_live` of them), the spare ones -1.
    Rows of a group (`row_group` consecutive rows) share their columns. `order` (int32 [R*slots])
    and `col_start` (int32 [C+1]) are the transposed index of `blockell_format`, or None when the
    caller gave none; `transposed()` builds it then.
    """

    col_indices: Tensor
    C: int
    B: int
    row_group: int
    num_live: int
    order: Tensor | None = None
    col_start: Tensor | None = None

    @property
    def R(self) -> int:  # noqa: N802
        return self.col_indices.shape[0]

    @property
    def slots(self) -> int:
        return self.col_indices.shape[1]

    @property
    def live(self) -> Tensor:
        """int32 [R, K]: the live part of `col_indices`."""
        return self.col_indices[:, : self.num_live]

    @property
    def groups(self) -> Tensor:
        """int32 [R / row_group, K]: the columns of each row group."""
        return self.col_indices[:: self.row_group, : self.num_live]

    def transposed(self) -> tuple[Tensor, Tensor]:
        """(order, col_start): for column c, `order[col_start[c]:col_start[c+1]]` are slot ids."""
        if self.order is not None and self.col_start is not None:
            return self.order, self.col_start
        few = self.col_indices.numel() * self.C <= MAX_LOOKED_THROUGH
        if few and (kernels := gpu_blocks(self.col_indices, self.B)):
            order, col_start = kernels.transposed(self.col_indices, self.C)
            return order, col_start
        from blockell_format import transposed_index

        index = transposed_index(self.col_indices, self.C)
        return index.order, index.col_start


class Verdict(NamedTuple):
    """Whether a backend beats the dense backend on a case, and the evidence in words."""

    wins: bool
    why: str


class Choice(NamedTuple):
    """The backend chosen for one direction, and why."""

    backend: str
    why: str
    refused: str | None = None
    """Why the backend asked for was not taken; None when it was, or none was asked for."""


class Backend:
    """One way to compute the operator. Subclasses override what they can do."""

    name: str = ""

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""
        return None

    def unsupported(self, case: Case) -> str | None:
        """Why this backend cannot run this case, or None."""
        return None

    def verdict(self, case: Case) -> Verdict:
        """Whether this backend beats the dense one on this case."""
        return Verdict(False, f"{self.name} is never chosen by itself")

    def details(self, case: Case) -> str | None:
        """How this backend computes a case, in words; None: there is one way only."""
        return None

    def beats_copied(self, case: Case, beside: bool = False) -> bool:
        """Whether this backend beats the dense product of a weight that is dense already.

        Beside: of a weight that would otherwise be made dense while other work is done.
        """
        return True

    def loses_to_one_copy(self, case: Case) -> bool:
        """Whether forward and input gradient, both by this backend, lose to dense ones.

        To two products by one dense weight, made for both.
        """
        return False

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        """y [N, R*B], contiguous, from values [R, slots, B, B] and bias [R*B].

        x [N, C*B] may have any strides.
        """
        raise AssertionError(f"{self.name} has no forward")

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        """dx [N, C*B], contiguous, from dy [N, R*B], contiguous.

        Columns that no row holds give zeros.
        """
        raise AssertionError(f"{self.name} has no grad_input")

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        """dv [R, slots, B, B], contiguous; zeros in spare slots. x may have any strides."""
        raise AssertionError(f"{self.name} has no grad_values")

    def block_grad_norms(self, dy: Tensor, x: Tensor, B: int) -> Tensor:
        """Squared Frobenius norms [R, C] of all blocks of dy^T x, which is never stored whole.

        float32, or float64 for float64 operands.
        """
        from blockell_kernels._stats import block_grad_norms_sq

        return block_grad_norms_sq(dy, x, B)

    def grad_values_and_norms(
        self, dy: Tensor, x: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """`grad_values` and `block_grad_norms` together.

        The norms need every block of dy^T x, so by default its rows are computed chunk by chunk,
        and the present blocks are picked out on the way.
        """
        from blockell_kernels._dense import grad_values_and_norms

        return grad_values_and_norms(dy, x, pattern)


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name. Imports its module; ImportError where that fails."""
    backend: Any = importlib.import_module(_MODULES[name]).BACKEND
    assert isinstance(backend, Backend), name
    return backend


@cache
def unavailable(name: str) -> str | None:
    """Why the backend cannot run on this machine at all, or None."""
    try:
        return get_backend(name).unavailable()
    except ImportError as error:
        return f"its module cannot be imported: {error}"


def _why_not(name: str, case: Case) -> str | None:
    return unavailable(name) or get_backend(name).unsupported(case)


def arithmetic(dtype: torch.dtype) -> object:
    """What a float32 product's choice depends on besides its sizes: torch's TF32 setting."""
    if dtype is not torch.float32:
        return None
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # the newer setting is in use, and reading the older one is an error
        return matmul.fp32_precision


def select(case: Case, requested: str = "auto") -> Choice:
    """The backend for one direction of one case. `requested` is one of `BACKEND_NAMES`."""
    return _select(case, requested, arithmetic(case.dtype))


def forget() -> None:
    """Decide anew from here on."""
    _select.cache_clear()


@lru_cache(maxsize=4096)
def _select(case: Case, requested: str, arithmetic: object) -> Choice:
    if requested != "auto":
        refused = _why_not(requested, case)
        if refused is None:
            return Choice(requested, f"{requested} was asked for")
        return select(case)._replace(refused=refused)
    sparse = SPARSE_ON.get(case.device.type)
    if sparse is None:
        return Choice("dense", f"no sparse backend for device type {case.device.type!r}")
    why_not = _why_not(sparse, case)
    if why_not is not None:
        return Choice("dense", f"{sparse} cannot run: {why_not}")
    wins, why = get_backend(sparse).verdict(case)
    return Choice(sparse if wins else "dense", why)


def shares(
    case: Case,
    forward: Choice,
    grad_input: Choice,
    requested: str = "auto",
    beside: bool = False,
) -> bool:
    """Whether one dense copy of the weight had better serve both products of a training step.

    A product that is chosen sparse by itself may lose to a dense one whose weight the other
    product has copied already; or both together to dense ones by one copy.

    Args:
        case: of the forward product.
        forward: its choice by itself.
        grad_input: that of the input gradient.
        requested: one of `BACKEND_NAMES`.
        beside: whether a copy for the input gradient alone is made beside the weight gradient.
    """
    names = forward.backend, grad_input.backend
    if "dense" not in names:
        return requested == "auto" and get_backend(names[0]).loses_to_one_copy(case)
    return not any(
        get_backend(name).beats_copied(
            case._replace(direction=direction), beside and direction == "forward"
        )
        for name, direction in zip(names, DIRECTIONS, strict=False)
        if name != "dense"
    )


def requested_backend(argument: str | None) -> str:
    """The argument, else the environment variable BLOCKELL_BACKEND, else "auto"."""
    name = argument or os.environ.get(ENV_VAR) or "auto"
    if name not in BACKEND_NAMES:
        source = "backend" if argument else f"environment variable {ENV_VAR}"
        raise ValueError(f"{source} (={name!r}) must be one of {', '.join(BACKEND_NAMES)}.")
    return name


_warned: set[tuple[str, str]] = set()


def warn_refused(requested: str, choice: Choice) -> None:
    """Warn, once per reason, that the backend asked for is not the one used."""
    if choice.refused is None or (requested, choice.refused) in _warned:
        return
    _warned.add((requested, choice.refused))
    warnings.warn(
        f"backend {requested!r} was asked for, but {choice.refused}; {choice.backend!r} is used.",
        RuntimeWarning,
        stacklevel=2,
    )
