"""The product under function transforms and forward-mode differentiation, by torch's own operators.

Legend: R block rows, C block columns, K live blocks per row, B tile side.

The kernels know one derivative, backwards. `torch.func` (grad, vmap, jvp, jacrev, hessian and what
is made of them, such as gradients per sample) and dual numbers ask for others;
they are given the dense weight, made of the tiles by an operator that torch can differentiate any
number of times and in either direction. It costs what a dense layer costs. Probes collect nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from blockell_format import to_dense


def transforms_active() -> bool:
    """Whether a transform of `torch.func` or a level of dual numbers is active.

    Products are composed of torch's own operators then, and probes collect nothing. False while
    `torch.compile` traces, which takes transforms apart by itself.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def composed_linear(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    num_live: int,
    activation: str = "none",
) -> Tensor:
    """f(x W^T + bias) [..., R*B] from x [..., C*B], values [R, slots, B, B], bias [R*B]."""
    R, _, B, _ = values.shape
    live, columns = values[:, :num_live], col_indices[:, :num_live]
    weight = to_dense(live, columns, R, x.shape[-1] // B, num_live, B)
    y = functional.linear(x, weight, bias)
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "none":
        return y
    return functional.relu(y) if activation == "relu" else functional.silu(y)
