"""`explain_mlp`: how `block_ell_mlp` would compute, and why.

Legend: R block rows, C block columns, B tile side of each layer, N tokens; h pre-activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from blockell_kernels._activation import Activation, check_activation
from blockell_kernels._backends import Pattern, requested_backend
from blockell_kernels._functional import Explanation, explain
from blockell_kernels._gpu import gpu_mlp
from blockell_kernels._plan import plan_for


class MLPExplanation(NamedTuple):
    """The backends of both layers, and where the activation is computed; printable."""

    first: Explanation
    second: Explanation
    activation: str
    """Where f(h) is computed: on the product of the first layer, or in a pass of its own."""
    slope: str
    """Where f'(h) is: on the input gradient of the second layer, or in a pass of its own."""

    def __str__(self) -> str:
        names = ("first layer", "second layer")
        lines = [
            f"{name}, {line}"
            for name, layer in zip(names, self[:2], strict=True)
            for line in str(layer).split("\n")
        ]
        return "\n".join([*lines, f"activation: {self.activation}", f"slope: {self.slope}"])


def explain_mlp(
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
    recompute: str | None = None,
    backend: str | None = None,
    **unused: Any,
) -> MLPExplanation:
    """How `block_ell_mlp` with the same arguments would compute, and why. Computes nothing.

    Where both the activation and its slope are passes of their own, the MLP is computed as two
    layers are.

    Args:
        x, values1, col_indices1, bias1, values2, col_indices2, bias2, activation, row_group1,
            row_group2, num_live1, num_live2, recompute, backend: as for `block_ell_mlp`.
        unused: its other arguments, which change nothing here.
    """
    check_activation(activation)
    N, width = x.numel() // x.shape[-1], values1.shape[0] * values1.shape[-1]
    h = x.new_empty(1, width).expand(N, width)
    first = explain(
        x, values1, col_indices1, bias1, row_group=row_group1, num_live=num_live1, backend=backend
    )
    second = explain(
        h, values2, col_indices2, bias2, row_group=row_group2, num_live=num_live2, backend=backend
    )
    ways = []
    for t, values, cols, row_group, num_live in (
        (x, values1, col_indices1, row_group1, num_live1),
        (h, values2, col_indices2, row_group2, num_live2),
    ):
        live = cols.shape[-1] if num_live is None else num_live
        R, _, B, _ = values.shape
        C = t.shape[-1] // B
        plan = plan_for(t, N, (R, C, B, row_group, live), requested_backend(backend))
        ways.append((plan, Pattern(cols, C, B, row_group, live)))
    kernels = gpu_mlp() if x.is_cuda else None
    if kernels is None:
        alone = "a pass of its own, as everywhere but on a GPU"
        return MLPExplanation(first, second, alone, alone)
    (plan1, pattern1), (plan2, pattern2) = ways
    dy = x.new_empty(1, values2.shape[0] * values2.shape[-1]).expand(N, -1)
    activated = slope = "a pass of its own, after a dense product"
    if plan1.forward_backend.name == "triton":
        x2d = x.reshape(-1, x.shape[-1]) if x.numel() else x.view(0, x.shape[-1])
        activated = kernels.forward_way(x2d, values1, pattern1, activation).why
    by_triton = plan2.grad_input_backend.name == "triton" and not plan2.keeps
    slope = kernels.middle_way(
        dy, values2, pattern2, h, sparse=by_triton, dense=plan2.requested == "auto",
        keep_a=recompute == "activation",
    ).why  # fmt: skip
    return MLPExplanation(first, second, activated, slope)
