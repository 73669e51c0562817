"""Parameter names that do not depend on how a model is wrapped."""

from __future__ import annotations

from torch import Tensor, nn

from cms_topology._convert import plain_name as plain_name
from cms_topology._convert import sparse_layers
from cms_topology._linear import CMSBlockLinear


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Name of every parameter; of a shared one the first. Wrappers leave no trace in names."""
    return {p: plain_name(name) for name, p in model.named_parameters()}


def sparse_by_values(model: nn.Module) -> dict[Tensor, CMSBlockLinear]:
    """The block-sparse layers by their weight parameter."""
    return {layer.values: layer for layer in sparse_layers(model).values()}
