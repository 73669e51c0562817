"""From dense models to sparse ones and back, in one line."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from cms_topology._linear import CMSBlockLinear
from cms_topology._shapes import resolve_row_group

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# wrappers that put their name in front of every submodule's
_WRAPPERS = ("module.", "_orig_mod.")


def sparse_layers(model: nn.Module) -> dict[str, CMSBlockLinear]:
    """All `CMSBlockLinear` of a model by name, without the prefixes of DDP and torch.compile."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CMSBlockLinear):
            for wrapper in _WRAPPERS:
                while name.startswith(wrapper):
                    name = name[len(wrapper) :]
            found[name.replace("._orig_mod", "") or "layer"] = module
    return found


def sparsify(
    model: ModuleT,
    *,
    density: float = 0.5,
    tile_size: int = 16,
    row_group: int | str = "auto",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    **kwargs: Any,
) -> ModuleT:
    """Replace the `nn.Linear` layers of a model by block-sparse ones, in place.

    Every replaced layer keeps its blocks of largest norm. Left alone are layers that another module
    shares weights with (a head tied to its embedding), subclasses of `nn.Linear`, and, with one
    warning that names them, layers whose sizes the tile does not divide.

    Args:
        model: changed in place. Build the optimizer afterwards: the parameters are new.
        density, tile_size, row_group: see `CMSBlockLinear`.
        include: glob pattern, or patterns, of the names of layers to replace ("*.mlp.*").
        exclude: patterns of names to leave dense; wins over `include`.
        **kwargs: further arguments of `CMSBlockLinear`.

    Returns:
        `model`, or its replacement if `model` itself is an `nn.Linear`.

    Raises:
        ValueError: nothing to replace; the message says which linear layers there are.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    chosen = {
        name: linear
        for name, linear in linears.items()
        if _matches(name, include) and not _matches(name, exclude) and uses[id(linear.weight)] == 1
    }
    indivisible = [
        name
        for name, linear in chosen.items()
        if linear.in_features % tile_size or linear.out_features % tile_size
    ]
    fitting = {name: linear for name, linear in chosen.items() if name not in indivisible}
    if not fitting:
        raise ValueError(
            f"sparsify found nothing to replace with include (={include!r}), exclude "
            f"(={exclude!r}) and tile_size (={tile_size}); linear layers of the model: "
            f"{sorted(linears) or 'none'}."
        )
    if isinstance(row_group, int):
        for linear in fitting.values():
            resolve_row_group(row_group, linear.out_features // tile_size, tile_size)
    if indivisible:
        warnings.warn(
            f"sparsify left {sorted(indivisible)} dense: their sizes are not multiples of "
            f"tile_size (={tile_size}).",
            stacklevel=2,
        )
    return _replace(
        model,
        {
            name: CMSBlockLinear.from_dense(
                linear, density=density, tile_size=tile_size, row_group=row_group, **kwargs
            )
            for name, linear in fitting.items()
        },
    )


def densify(model: ModuleT) -> ModuleT:
    """Replace every `CMSBlockLinear` of a model by an `nn.Linear` of the same function, in place.

    Returns:
        `model`, or its replacement if `model` itself is a `CMSBlockLinear`.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CMSBlockLinear)}
    return _replace(model, {name: layer.to_linear() for name, layer in layers.items()})


def _replace(model: ModuleT, new: dict[str, Any]) -> ModuleT:
    for name, module in new.items():
        if name == "":
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    listed = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)
