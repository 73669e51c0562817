"""`block_ell_mlp`: two Block-ELL layers and the activation between them, as one function.

Legend: R block rows, C block columns, K live blocks per row, B tile side of each layer, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels._activation import Activation, check_activation
from blockell_kernels._backends import requested_backend
from blockell_kernels._eager import index_facts, plain
from blockell_kernels._functional import TransposedIndexLike
from blockell_kernels._mlp_autograd import eager_mlp
from blockell_kernels._mlp_core import RECOMPUTE, Recompute
from blockell_kernels._mlp_ops import ACTIVATION, FIRST, SECOND, Sizes, X, mlp_op, sizes_of
from blockell_kernels._stats import Sample
from blockell_kernels._transforms import composed_linear, transforms_active
from blockell_kernels._validation import check_operands, packed, parts_of

MAX_CHECKED = 4096
_checked: dict[tuple[Any, ...], Sizes] = {}


def block_ell_mlp(
    x: Tensor,
    values1: Tensor,
    col_indices1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    col_indices2: Tensor,
    bias2: Tensor | None,
    activation: Activation = "gelu",
    *,
    row_group1: int = 1,
    row_group2: int = 1,
    num_live1: int | None = None,
    num_live2: int | None = None,
    index1: TransposedIndexLike | None = None,
    index2: TransposedIndexLike | None = None,
    probe1: Tensor | None = None,
    probe2: Tensor | None = None,
    sample1: Sample = "none",
    sample2: Sample = "none",
    recompute: Recompute | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = f(x W1^T + bias1) W2^T + bias2 for two Block-ELL weights: a transformer's MLP.

    The same function as `block_ell_linear`, `f`, `block_ell_linear`, with the same gradients and
    statistics, but fewer passes over the hidden features: on the block-sparse GPU kernels the
    activation and its derivative are computed where the products end. Differentiable once in `x`,
    the values and the biases. Works under `torch.autocast`, `torch.compile` and activation
    checkpointing, and under transforms as `block_ell_linear` does. There is no dropout inside.

    Args:
        x: [..., C1*B1], any strides, any number of tokens including none.
        values1, col_indices1, bias1: the first layer, [R1, slots1, B1, B1], int32 [R1, slots1] and
            [R1*B1] or None, as for `block_ell_linear`.
        values2, col_indices2, bias2: the second one; it has C2 = R1*B1 / B2 block columns.
        activation: "gelu" (by the error function), "gelu_tanh", "relu", "silu" or "none".
        row_group1, row_group2, num_live1, num_live2, index1, index2: of each layer, as for
            `block_ell_linear`.
        probe1, probe2, sample1, sample2: what each layer's probe collects, as for
            `block_ell_linear`.
        recompute: what the backward pass computes again rather than the forward pass saving it,
            from the fastest to the leanest: "none" (saved are h = x W1^T + bias1 and f(h)),
            "activation" (f(h) is computed again; saved is h) or "hidden" (h, too, by one more
            product; saved is neither). Default: "none", which saves what `torch.compile` saves of
            the same dense MLP.
        backend: as for `block_ell_linear`, of both layers.

    Returns:
        [..., R2*B2].

    Raises:
        ValueError: an operand's shape, dtype or device, or a name, breaks a rule above.
    """
    values1, values2 = packed("values1", values1), packed("values2", values2)
    col_indices1 = packed("col_indices1", col_indices1)
    col_indices2 = packed("col_indices2", col_indices2)
    bias1 = None if bias1 is None else packed("bias1", bias1)
    bias2 = None if bias2 is None else packed("bias2", bias2)
    live1 = col_indices1.shape[-1] if num_live1 is None else num_live1
    live2 = col_indices2.shape[-1] if num_live2 is None else num_live2
    if sample1 == "none" or (probe1 is not None and not probe1.requires_grad):
        sample1, probe1 = "none", None
    if sample2 == "none" or (probe2 is not None and not probe2.requires_grad):
        sample2, probe2 = "none", None
    if recompute is None:
        recompute = "none"
    order1, start1 = parts_of("index1", index1)
    order2, start2 = parts_of("index2", index2)
    args = (
        x,
        *(values1, col_indices1, bias1, probe1, order1, start1, row_group1, live1, sample1),
        *(values2, col_indices2, bias2, probe2, order2, start2, row_group2, live2, sample2),
        *(activation, recompute, backend or ""),
    )
    given = (x, values1, col_indices1, bias1, values2, col_indices2, bias2)
    if not torch.compiler.is_compiling() and plain(*given):
        return eager_mlp(args, _sizes(args))
    _check(args)
    if transforms_active():
        h = composed_linear(x, values1, col_indices1, bias1, live1, activation)
        return composed_linear(h, values2, col_indices2, bias2, live2)
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad
        for t in (x, values1, bias1, probe1, values2, bias2, probe2)
    ):
        args = (*args[:-2], "hidden", args[-1])  # nothing will be asked for again
    result: Tensor = mlp_op(*args)[0]
    return result


def _sizes(args: tuple[Any, ...]) -> Sizes:
    """What plans are looked up by, of operands checked once per kind of call."""
    x, first, second = args[X], args[FIRST], args[SECOND]
    # All that is checked.
    key = (
        x.shape, x.dtype, x.device, torch.is_autocast_enabled(x.device.type),
        *_facts(*first[:6]), *first[6:], *_facts(*second[:6]), *second[6:], *args[ACTIVATION:],
    )  # fmt: skip
    sizes = _checked.get(key)
    if sizes is None:
        _check(args)
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        sizes = _checked[key] = sizes_of(args)
    return sizes


def _facts(
    values: Tensor,
    cols: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    order: Tensor | None,
    col_start: Tensor | None,
) -> tuple[Any, ...]:
    """All that is checked of a layer's operands."""
    return (
        values.shape, values.dtype, values.device, cols.shape, cols.dtype, cols.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if probe is None else (probe.shape, probe.dtype, probe.device),
        index_facts(order, col_start),
    )  # fmt: skip


def _check(args: tuple[Any, ...]) -> None:
    x, (activation, recompute, backend) = args[X], args[ACTIVATION:]
    check_activation(activation)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute (={recompute!r}) must be one of {', '.join(RECOMPUTE)}.")
    if backend:
        requested_backend(backend)
    for name, given in (("first", args[FIRST]), ("second", args[SECOND])):
        values, cols, bias, probe, order, start, row_group, num_live, sample = given
        try:
            check_operands(
                x, values, cols, bias, row_group, num_live, probe, sample, (order, start)
            )
        except ValueError as error:
            raise ValueError(f"{name} layer: {error}") from None
        x = x.new_empty(0, values.shape[0] * values.shape[-1])  # what the next layer is fed
