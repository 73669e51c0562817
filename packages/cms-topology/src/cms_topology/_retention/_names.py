"""Parameter names that do not depend on how a model is wrapped."""

from __future__ import annotations

from torch import Tensor, nn

from cms_topology._convert import sparse_layers
from cms_topology._linear import CMSBlockLinear

_WRAPPERS = ("module.", "_orig_mod.")


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


def plain_name(name: str) -> str:
    """A parameter's or module's name without the prefixes of DDP and torch.compile."""
    for wrapper in _WRAPPERS:
        while name.startswith(wrapper):
            name = name[len(wrapper) :]
    return name.replace("._orig_mod.", ".")
