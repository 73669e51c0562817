"""Two linear layers with an activation between them, as one function where both are block-sparse.

Legend: x [..., fc1.in_features], result [..., fc2.out_features].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from blockell_kernels import block_ell_mlp
from cms_topology._linear import CMSBlockLinear

Activation = Literal["none", "gelu", "gelu_tanh", "relu", "silu"]


def block_sparse_mlp(
    x: Tensor,
    fc1: nn.Module,
    fc2: nn.Module,
    activation: Activation = "gelu",
    *,
    recompute: Literal["none", "activation", "hidden"] | None = None,
    add_bias: bool = True,
) -> Tensor:
    """`fc2(f(fc1(x)))`, fused where both layers are `CMSBlockLinear` and nobody would notice.

    Results, gradients and collected statistics are those of the three calls. The layers are called
    one by one whenever something hangs on their being called: forward or backward hooks (of a
    layer or global), a subclass, a `forward` of its own, different backends, another layer type, or
    scores in nats (`candidate_score="loss"`) in the steps that collect them.

    Args:
        x: [..., fc1.in_features].
        fc1, fc2: the layers; any modules that map the last dimension.
        activation: f: "gelu" (by the error function), "gelu_tanh", "relu", "silu" or "none".
        recompute: what the fused backward pass computes again; see
            `blockell_kernels.block_ell_mlp`.
        add_bias: False leaves out the bias of fc2, for who adds the result to something anyway;
            only where `mlp_is_fused` says so.

    Returns:
        [..., fc2.out_features].

    Raises:
        ValueError: an unknown activation, shapes that do not fit, or `add_bias=False` for layers
            that are called one by one.
    """
    if not mlp_is_fused(fc1, fc2):
        if not add_bias:
            raise ValueError(
                "add_bias (=False) must be True for layers that are called one by one; ask "
                "mlp_is_fused(fc1, fc2) first."
            )
        return _one_by_one(x, fc1, fc2, activation)
    assert isinstance(fc1, CMSBlockLinear)
    assert isinstance(fc2, CMSBlockLinear)
    _check_widths(x, fc1, fc2)
    if not torch.compiler.is_compiling():  # as in `CMSBlockLinear.forward`
        fc1._refresh_if_stale()
        fc2._refresh_if_stale()
    sample1, sample2 = fc1._sample(), fc2._sample()
    return block_ell_mlp(
        x,
        fc1.values,
        fc1.col_indices,
        fc1.bias,
        fc2.values,
        fc2.col_indices,
        fc2.bias if add_bias else None,
        activation,
        row_group1=fc1.row_group,
        row_group2=fc2.row_group,
        num_live1=fc1.num_live,
        num_live2=fc2.num_live,
        index1=fc1._index,
        index2=fc2._index,
        probe1=None if sample1 == "none" else fc1._probe,
        probe2=None if sample2 == "none" else fc2._probe,
        sample1=sample1,
        sample2=sample2,
        recompute=recompute,
        backend=fc1.backend,
    )


def _check_widths(x: Tensor, fc1: CMSBlockLinear, fc2: CMSBlockLinear) -> None:
    """What `CMSBlockLinear.forward` checks: the function takes its widths from x alone."""
    width = x.shape[-1] if x.ndim else 0
    if width != fc1.in_features:
        raise ValueError(
            f"the last dimension of x (={width}) must be fc1.in_features (={fc1.in_features})."
        )
    if fc1.out_features != fc2.in_features:
        raise ValueError(
            f"fc1.out_features (={fc1.out_features}) must be fc2.in_features (={fc2.in_features})."
        )


def mlp_is_fused(fc1: nn.Module, fc2: nn.Module) -> bool:
    """Whether `block_sparse_mlp` runs these layers as one function if it is called now."""
    if not (_plain(fc1) and _plain(fc2)) or _global_hooks():
        return False
    return bool(fc1.backend == fc2.backend)


def _one_by_one(x: Tensor, fc1: nn.Module, fc2: nn.Module, activation: Activation) -> Tensor:
    h = fc1(x)
    if activation in ("gelu", "gelu_tanh"):
        h = functional.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation in ("relu", "silu"):
        h = functional.relu(h) if activation == "relu" else functional.silu(h)
    elif activation != "none":
        raise ValueError(
            f"activation (={activation!r}) must be one of none, gelu, gelu_tanh, relu, silu."
        )
    result: Tensor = fc2(h)
    return result


def _plain(layer: nn.Module) -> bool:
    """Whether a call does what `block_ell_linear` does for a `CMSBlockLinear`, and nothing else."""
    if type(layer) is not CMSBlockLinear:
        return False
    held = layer.__dict__  # a module's attributes take several times as long
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        # scores in nats are collected between the layer and the activation
        or (held["_fisher_probe"] is not None and layer._sample() != "none")
    )


def _global_hooks() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
