"""The custom operators `blockell::mlp` and `blockell::mlp_backward`: what they take and compute.

Legend: N tokens; layer 1 maps in -> hidden features, layer 2 hidden -> out; h pre-activation and
a = f(h), both [N, hidden]; R, C, B, K of each layer as always.

As in `_ops`, both are opaque to the compiler and choose their backends when they run. Operands have
been validated by `block_ell_mlp`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Sizes(NamedTuple):
    """What the plans of both layers of a call are looked up by."""

    N: int
    first: tuple[int, int, int, int, int]
    """(R, C, B, row_group, num_live)."""
    second: tuple[int, int, int, int, int]


def sizes_of(args: tuple[Any, ...]) -> Sizes:
    """The sizes in the arguments of `mlp`."""
    x, sizes = args[X], []
    width = x.shape[-1]
    for part in (FIRST, SECOND):
        values, _, _, _, _, _, row_group, num_live, _ = args[part]
        R, _, B, _ = values.shape
        sizes.append((R, width // B, B, row_group, num_live))
        width = R * B
    return Sizes(x.numel() // x.shape[-1], *sizes)


def layers_of(args: tuple[Any, ...], sizes: Sizes) -> tuple[Layer, Layer]:
    """Both layers from the arguments of `mlp`."""
    requested = requested_backend(args[BACKEND] or None)
    values1, cols1, bias1, _, order1, start1, *_ = args[FIRST]
    values2, cols2, bias2, _, order2, start2, *_ = args[SECOND]
    plan1 = plan_for(args[X], sizes.N, sizes.first, requested)
    plan2 = plan_for(args[X], sizes.N, sizes.second, requested)
    return (
        Layer(plan1, plan1.pattern(cols1, order1, start1), values1, bias1),
        Layer(plan2, plan2.pattern(cols2, order2, start2), values2, bias2),
    )


@torch.library.impl(library, "mlp", "CompositeExplicitAutograd")
def mlp(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., out], h or empty, a or empty); see `block_ell_mlp`."""
    x, recompute = args[X], args[RECOMPUTE]
    x2d = flat(x)
    keep_pre = recompute != "hidden"
    layers = layers_of(args, sizes_of(args))
    y, a, h, _ = core.forward(x2d, *layers, args[ACTIVATION], keep_pre, False)
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


@torch.library.impl(library, "mlp_backward", "CompositeExplicitAutograd")
def mlp_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    a: Tensor | None,
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
    """(dx, dvalues1, dbias1, dprobe1, dvalues2, dbias2, dprobe2); those not needed are empty."""
    (R1, _), (R2, _), requested = (
        col_indices1.shape,
        col_indices2.shape,
        requested_backend(backend or None),
    )
    N, C2 = dy.numel() // (R2 * B2), R1 * B1 // B2
    plan1 = plan_for(dy, N, (R1, C1, B1, row_group1, num_live1), requested)
    plan2 = plan_for(dy, N, (R2, C2, B2, row_group2, num_live2), requested)
    first = Layer(plan1, plan1.pattern(col_indices1, order1, col_start1), values1, bias1)
    second = Layer(plan2, plan2.pattern(col_indices2, order2, col_start2), values2, None)
    grads = core.backward(
        dy, x, [h, a], first, second, Needs(*needs), (sample1, sample2), activation
    )
    return tuple(or_empty(grad, dy) for grad in grads)


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
