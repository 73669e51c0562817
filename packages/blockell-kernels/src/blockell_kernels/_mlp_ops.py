"""The custom operators `blockell::mlp` and `blockell::mlp_backward`: what they take and compute.

Legend: N tokens; layer 1 maps in -> hidden features, layer 2 hidden -> out; h pre-activation and
a = f(h), both [N, hidden]; R, C, B, K of each layer as always.

As in `_ops`, both are opaque to the compiler and choose their backends when they run. Operands have
been validated by `block_ell_mlp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels import _mlp_core as core
from blockell_kernels._backends import requested_backend
from blockell_kernels._mlp_core import Layer, Needs, flat, shaped
from blockell_kernels._plan import plan_for
from blockell_kernels._registration import TAGS, library, or_empty
from blockell_kernels._stats import probe_size


def _layer_schema(i: int) -> str:
    return (
        f"Tensor values{i}, Tensor col_indices{i}, Tensor? bias{i}, Tensor? probe{i}, "
        f"Tensor? order{i}, Tensor? col_start{i}, int row_group{i}, int num_live{i}, str sample{i}"
    )


# What is not saved for the backward pass, or not needed of it, comes back empty.
library.define(
    f"mlp(Tensor x, {_layer_schema(1)}, {_layer_schema(2)}, str activation, str recompute, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "mlp_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? a, "
    "Tensor? values1, Tensor col_indices1, Tensor? bias1, Tensor? order1, Tensor? col_start1, "
    "int C1, int B1, int row_group1, int num_live1, str sample1, "
    "Tensor? values2, Tensor col_indices2, Tensor? order2, Tensor? col_start2, "
    "int B2, int row_group2, int num_live2, str sample2, "
    "bool[5] needs, str activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
mlp_op = torch.ops.blockell.mlp.default
mlp_backward_op = torch.ops.blockell.mlp_backward.default

# Positions in the arguments of `mlp`.
X, FIRST, SECOND, ACTIVATION, RECOMPUTE, BACKEND = 0, slice(1, 10), slice(10, 19), 19, 20, 21
VALUES1, BIAS1, PROBE1, VALUES2, BIAS2, PROBE2 = 1, 3, 4, 10, 12, 13
ARGUMENTS = 22


def _layer(
    like: Tensor,
    N: int,
    C: int,
    B: int,
    values: Tensor | None,
    col_indices: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    col_start: Tensor | None,
    row_group: int,
    num_live: int,
    backend: str,
) -> Layer:
    sizes = (col_indices.shape[0], C, B, row_group, num_live)
    plan = plan_for(like, N, sizes, requested_backend(backend or None))
    return Layer(plan, plan.pattern(col_indices, order, col_start), values, bias)


def layers_of(args: tuple[Any, ...], x: Tensor) -> tuple[Layer, Layer]:
    """Both layers from the arguments of `mlp`; x [N, in]."""
    N, width, layers = x.shape[0], x.shape[1], []
    for part in (FIRST, SECOND):
        values, cols, bias, _, order, start, row_group, num_live, _ = args[part]
        B = values.shape[-1]
        numbers = (row_group, num_live, args[BACKEND])
        layers.append(_layer(x, N, width // B, B, values, cols, bias, order, start, *numbers))
        width = values.shape[0] * B
    return layers[0], layers[1]


@torch.library.impl(library, "mlp", "CompositeExplicitAutograd")
def mlp(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., out], h or empty, a or empty); see `block_ell_mlp`."""
    x, recompute = args[X], args[RECOMPUTE]
    x2d = flat(x)
    keep_pre = recompute != "hidden"
    y, a, h, _ = core.forward(x2d, *layers_of(args, x2d), args[ACTIVATION], keep_pre, False)
    y = shaped(y, x)
    if h is a:  # no activation: outputs of an operator must not be one another
        h = a.clone() if recompute == "none" else h
    return y, or_empty(h, x), a if recompute == "none" else or_empty(None, x)


def _mlp_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, recompute = args[X], args[RECOMPUTE]
    out, width = (args[i].shape[0] * args[i].shape[-1] for i in (VALUES2, VALUES1))
    tokens = x.numel() // x.shape[-1]
    return (
        x.new_empty(*x.shape[:-1], out),
        x.new_empty(tokens, width) if recompute != "hidden" else x.new_empty(0),
        x.new_empty(tokens, width) if recompute == "none" else x.new_empty(0),
    )


def run_backward(
    weights: tuple[core.Weights, core.Weights] | None,
    last: bool,
    dy: Tensor,
    x: Tensor | None,
    held: list[Tensor | None],
    values1: Tensor | None,
    col_indices1: Tensor,
    bias1: Tensor | None,
    order1: Tensor | None,
    col_start1: Tensor | None,
    C1: int,
    B1: int,
    row_group1: int,
    num_live1: int,
    sample1: str,
    values2: Tensor | None,
    col_indices2: Tensor,
    order2: Tensor | None,
    col_start2: Tensor | None,
    B2: int,
    row_group2: int,
    num_live2: int,
    sample2: str,
    needs: list[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """(dx, dvalues1, dbias1, dprobe1, dvalues2, dbias2, dprobe2); those not needed are empty.

    `weights`: dense weights that an eager forward pass kept. `last`: h will not be asked for again,
    and its memory may be used. `held`: h and a, to be emptied. What follows is the operator's.
    """
    dy2d = flat(dy)
    N, width = dy2d.shape[0], col_indices1.shape[0] * B1
    first = _layer(
        dy, N, C1, B1, values1, col_indices1, bias1, order1, col_start1, row_group1, num_live1,
        backend,
    )  # fmt: skip
    second = _layer(
        dy, N, width // B2, B2, values2, col_indices2, None, order2, col_start2, row_group2,
        num_live2, backend,
    )  # fmt: skip
    grads = core.backward(
        dy2d, None if x is None else flat(x), held, first, second, Needs(*needs),
        (sample1, sample2), activation, weights, last,
    )  # fmt: skip
    if grads[0] is not None and dy.ndim != 2:
        grads[0] = grads[0].view(*dy.shape[:-1], C1 * B1)
    return tuple(or_empty(grad, dy) for grad in grads)


@torch.library.impl(library, "mlp_backward", "CompositeExplicitAutograd")
def mlp_backward(*args: Any) -> tuple[Tensor, ...]:
    """See `run_backward`."""
    dy, x, h, a, *rest = args
    return run_backward(None, False, dy, x, [h, a], *rest)


def _mlp_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    dy, cols1, cols2, needs = args[0], args[5], args[15], args[22]
    C1, B1, sample1, B2, sample2 = args[9], args[10], args[13], args[18], args[21]
    R1, R2 = cols1.shape[0], cols2.shape[0]
    C2 = R1 * B1 // B2

    def probe(sample: str, R: int, C: int) -> Tensor:
        if sample == "none":
            return dy.new_empty(0)
        return dy.new_empty(probe_size(R, C), dtype=torch.float32)

    def grad(needed: bool, *shape: int) -> Tensor:
        return dy.new_empty(*shape) if needed else dy.new_empty(0)

    return (
        grad(needs[0], *dy.shape[:-1], C1 * B1),
        grad(needs[1], *cols1.shape, B1, B1),
        grad(needs[2], R1 * B1),
        probe(sample1, R1, C1),
        grad(needs[3], *cols2.shape, B2, B2),
        grad(needs[4], R2 * B2),
        probe(sample2, R2, C2),
    )


torch.library.register_fake("blockell::mlp", _mlp_fake, lib=library)
torch.library.register_fake("blockell::mlp_backward", _mlp_backward_fake, lib=library)
