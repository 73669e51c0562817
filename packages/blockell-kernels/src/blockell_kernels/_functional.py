"""`block_ell_linear` and what goes with it: the functional interface of the package.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from blockell_kernels._activated_ops import activated_linear
from blockell_kernels._activation import Activation, check_activation
from blockell_kernels._backends import (
    DIRECTIONS,
    Case,
    Choice,
    get_backend,
    requested_backend,
    select,
)
from blockell_kernels._eager import eager_linear, plain
from blockell_kernels._ops import linear_op
from blockell_kernels._plan import compute_dtype, keeps_copy
from blockell_kernels._stats import Sample, block_grad_norms_sq
from blockell_kernels._transforms import composed_linear, transforms_active
from blockell_kernels._validation import (
    check_gradient_and_input,
    check_operands,
    packed,
    parts_of,
)


class TransposedIndexLike(Protocol):
    """What `blockell_format.transposed_index` returns; see there."""

    @property
    def order(self) -> Tensor: ...  # int32 [R*slots]
    @property
    def col_start(self) -> Tensor: ...  # int32 [C+1]


def block_ell_linear(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    row_group: int = 1,
    num_live: int | None = None,
    index: TransposedIndexLike | None = None,
    probe: Tensor | None = None,
    sample: Sample = "none",
    activation: Activation = "none",
    backend: str | None = None,
) -> Tensor:
    """y = f(x W^T + bias) for a Block-ELL weight W [R*B, C*B]; by default without an f.

    W holds, in block row r, the tiles `values[r, k]` at block columns `col_indices[r, k]`, and is
    zero elsewhere. Differentiable once in `x`, `values` and `bias`; the gradient of `values` covers
    the blocks that are present. Works under `torch.autocast`, `torch.compile` and activation
    checkpointing. The result does not depend on the order of slots beyond rounding. Under the
    transforms of `torch.func` and with dual numbers it is composed of the dense weight and torch's
    own operators, so that any derivative exists; probes collect nothing then.

    Args:
        x: [..., C*B], any strides, any number of tokens including none.
        values: [R, slots, B, B], of x's dtype (float16, bfloat16, float32 or float64) and device.
            Of values, columns and bias with gaps between elements a copy is made at every call.
        col_indices: int32 [R, slots]. In each row the first `num_live` entries are distinct columns
            in [0, C); what follows is spare capacity, -1, not computed with. Not checked at every
            call: `check_topology` does that, when the topology changes. On the CPU a column out of
            range raises IndexError where it is used.
        bias: [R*B] or None.
        row_group: every `row_group` consecutive rows hold the same columns (precondition). Taller
            groups are faster.
        num_live: live blocks per row; default: all slots.
        index: `blockell_format.transposed_index(col_indices, C)`, kept by the caller so that
            backends which need it do not rebuild it at every backward pass.
        probe: float32 [probe_size(R, C)] with requires_grad. Its "gradient" is not one: it is
            per-block statistics of this backward pass, in float32: sum over tokens of |dy_r|^2
            (R elements), of |x_c|^2 (C elements), and ||dy_r^T x_c||_F^2 for all blocks, present or
            not (R*C elements, row by row; zeros unless `sample` is "gradient").
        sample: "none", "norms" or "gradient": what the probe collects.
        activation: f: "none", "gelu" (by the error function), "gelu_tanh", "relu" or "silu"; on the
            block-sparse GPU kernels a part of the product. For two layers with one between them
            `block_ell_mlp` does more.
        backend: "auto", "triton", "gathered", "dense" or "reference"; default: the environment
            variable BLOCKELL_BACKEND, else "auto". `explain` tells what is chosen and why. One
            that cannot run is replaced, with one RuntimeWarning.

    Returns:
        [..., R*B].

    Raises:
        ValueError: an operand's shape, dtype or device breaks a rule above.
    """
    values, col_indices = packed("values", values), packed("col_indices", col_indices)
    bias = None if bias is None else packed("bias", bias)
    order, col_start = parts_of("index", index)
    if activation != "none":
        check_activation(activation)
        slots = col_indices.shape[-1] if num_live is None else num_live
        check_operands(
            x, values, col_indices, bias, row_group, slots, probe, sample, (order, col_start)
        )
        if sample == "none" or (probe is not None and not probe.requires_grad):
            sample, probe = "none", None
        requested = "" if backend is None else requested_backend(backend)
        if transforms_active():
            return composed_linear(x, values, col_indices, bias, slots, activation)
        eager = not torch.compiler.is_compiling() and plain(x, values, col_indices, bias)
        return activated_linear(
            eager, x, values, col_indices, bias, probe, order, col_start, row_group, slots, sample,
            activation, requested,
        )  # fmt: skip
    if not torch.compiler.is_compiling() and plain(x, values, col_indices, bias):
        if sample == "none":
            probe = None
        return eager_linear(
            x, values, col_indices, bias, probe, order, col_start, row_group, num_live, sample,
            backend,
        )  # fmt: skip
    slots = col_indices.shape[-1] if num_live is None else num_live
    check_operands(
        x, values, col_indices, bias, row_group, slots, probe, sample, (order, col_start)
    )
    if backend is not None:
        requested_backend(backend)
    if transforms_active():
        return composed_linear(x, values, col_indices, bias, slots)
    if sample == "none" or (probe is not None and not probe.requires_grad):
        probe = None
    result: Tensor = linear_op(
        x, values, col_indices, bias, probe, order, col_start, row_group, slots, sample,
        backend or "",
    )  # fmt: skip
    return result


def block_grad_norms(grad_out: Tensor, x: Tensor, B: int) -> Tensor:
    """Frobenius norms of all B x B blocks of the dense weight gradient grad_out^T x.

    The gradient is computed a few block rows at a time and never stored whole. Not differentiable.

    Args:
        grad_out: [..., R*B].
        x: [..., C*B], same leading dimensions, dtype and device.
        B: tile side.

    Returns:
        float32 [R, C] (float64 for float64 operands).

    Raises:
        ValueError: leading dimensions, dtypes or devices differ, or B divides no width.
    """
    check_gradient_and_input("grad_out", grad_out, x, B)
    with torch.no_grad():
        N = x.shape[:-1].numel()
        dy2d, x2d = grad_out.reshape(N, grad_out.shape[-1]), x.reshape(N, x.shape[-1])
        return block_grad_norms_sq(dy2d, x2d, B).sqrt_()


class Explanation(NamedTuple):
    """The backend chosen per direction, and why; printable."""

    forward: Choice
    grad_input: Choice
    grad_values: Choice

    def __str__(self) -> str:
        lines = []
        for direction, choice in zip(self._fields, self, strict=True):
            refused = f" (asked for another, but {choice.refused})" if choice.refused else ""
            lines.append(f"{direction}: {choice.backend}: {choice.why}{refused}")
        return "\n".join(lines)


def explain(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    row_group: int = 1,
    num_live: int | None = None,
    backend: str | None = None,
    **unused: Any,
) -> Explanation:
    """Which backend `block_ell_linear` with the same arguments would use, and why.

    `why` says, too, by which kernels, and how float32 operands are multiplied where that is not
    IEEE's way.

    Of each product by itself: a training step takes the dense product for both `forward` and
    `grad_input` where one copy of the weight for the two is faster; `why` says so then.

    Computes nothing; tensors on the "meta" device will do for sizes, but choices are per device.
    """
    slots = col_indices.shape[-1] if num_live is None else num_live
    check_operands(x, values, col_indices, bias, row_group, slots, None, "none")
    R, _, B, _ = values.shape
    C = x.shape[-1] // B
    sizes = (x.numel() // x.shape[-1], R, C, slots, B, row_group)
    requested = requested_backend(backend)
    dtype = compute_dtype(x)
    cases = [Case(direction, x.device, dtype, *sizes) for direction in DIRECTIONS]
    choices = [_with_details(select(case, requested), case) for case in cases]
    if keeps_copy(cases[0], choices, requested):
        choices[:2] = [_shared(choice) for choice in choices[:2]]
    return Explanation(*choices)


def _with_details(choice: Choice, case: Case) -> Choice:
    words = get_backend(choice.backend).details(case)
    return choice if words is None else choice._replace(why=f"{choice.why}; {words}")


def _shared(choice: Choice) -> Choice:
    """Says of a sparse choice that a training step takes the other product's dense copy."""
    if choice.backend == "dense":
        return choice
    return choice._replace(
        why=f"{choice.why}; but a training step takes the dense product here, by one dense copy of "
        "the weight for both"
    )
