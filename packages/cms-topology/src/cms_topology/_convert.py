"""From dense models to sparse ones and back, in one line."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cms_topology._linear import CMSBlockLinear
from cms_topology._shapes import resolve_row_group

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# what wrappers of a whole model put in front of every submodule's name: DDP, torch.compile, Fabric
_WRAPPERS = ("module", "_orig_mod", "_forward_module")
# and those of a part of it wherever that is: torch.compile, activation checkpointing
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_OWN = ("weight", "bias")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def sparse_layers(model: nn.Module) -> dict[str, CMSBlockLinear]:
    """All `CMSBlockLinear` of a model by name, without what wrappers put into names.

    DDP's, torch.compile's, Fabric's and checkpoint_wrapper's: a layer decides alike under each.

    Layers that would have one name then keep their prefixes.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CMSBlockLinear)}
    plain = {name: plain_name(name) or "layer" for name in layers}
    seen = Counter(plain.values())
    return {name if seen[plain[name]] > 1 else plain[name]: m for name, m in layers.items()}


def plain_name(name: str) -> str:
    """A parameter's or module's name without what wrappers put into it."""
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(part for part in parts if part not in _INNER)


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

    Every replaced layer keeps its blocks of largest norm; one that is used in several places, is
    replaced in all of them. Left alone are layers that share a parameter with another module (a
    head tied to its embedding), subclasses of `nn.Linear`, and, with one warning that names them,
    layers whose sizes the tile does not divide, that are pruned, or that have hooks. A pattern that
    matches no module at all is named in a warning, too.

    Args:
        model: changed in place. Build the optimizer afterwards: the parameters are new.
        density, tile_size, row_group: see `CMSBlockLinear`.
        include: glob pattern, or patterns, of the names of layers to replace ("*.mlp.*").
        exclude: patterns of names to leave dense; wins over `include`.
        **kwargs: further arguments of `CMSBlockLinear`.

    Returns:
        `model`, or its replacement if `model` itself is an `nn.Linear`.

    Raises:
        ValueError: nothing to replace; the message says which linear layers there are. Or `model`
            is wrapped by DistributedDataParallel already.
    """
    _refuse_wrapped(model, "sparsify")
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            names.setdefault(module, []).append(name)
    left: dict[str, list[str]] = {}
    fitting, tied = [], []
    for linear, places in names.items():
        if not any(_matches(name, include) for name in places) or any(
            _matches(name, exclude) for name in places
        ):
            continue
        if any(uses[id(p)] > 1 for p in linear.parameters()):
            tied.append(places[0])
            continue
        reason = _reason_to_leave(linear, tile_size)
        if reason is None:
            fitting.append(linear)
        else:
            left.setdefault(reason, []).append(places[0])
    said = "".join(f" Left dense were {sorted(names)}: {why}." for why, names in left.items())
    if tied and not fitting:
        said += f" {sorted(tied)} share a parameter with another module and stay dense, too."
    if not fitting:
        raise ValueError(
            f"sparsify found nothing to replace with include (={include!r}), exclude "
            f"(={exclude!r}) and tile_size (={tile_size}); linear layers of the model: "
            f"{sorted(places[0] for places in names.values()) or 'none'}.{said}"
        )
    if isinstance(row_group, int):
        for linear in fitting:
            resolve_row_group(row_group, linear.out_features // tile_size, tile_size)
    strays = [p for p in (*_listed(include), *_listed(exclude)) if not _matches_any(p, model)]
    if strays:
        warnings.warn(
            f"sparsify was given patterns that match no module's name: {strays}; linear layers of "
            f"the model: {sorted(places[0] for places in names.values())}.",
            stacklevel=2,
        )
    for reason, those in left.items():
        warnings.warn(f"sparsify left {sorted(those)} dense: {reason}.", stacklevel=2)
    made = {
        linear: CMSBlockLinear.from_dense(
            linear, density=density, tile_size=tile_size, row_group=row_group, **kwargs
        )
        for linear in fitting
    }
    return _replace(model, made)


def _refuse_wrapped(model: nn.Module, function: str) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model (={type(model).__name__}) must not be wrapped by DistributedDataParallel yet: "
            f"the gradients of new layers would not be averaged. Call {function}() before."
        )


def _reason_to_leave(linear: nn.Linear, tile_size: int) -> str | None:
    """Why a layer cannot be replaced without losing something; None: it can."""
    if linear.in_features % tile_size or linear.out_features % tile_size:
        return f"their sizes are not multiples of tile_size (={tile_size})"
    if any(linear._parameters.get(name, None) is not getattr(linear, name) for name in _OWN):
        return "something computes their weights, pruning for instance; make that permanent first"
    if _hooks(linear):
        return "they have hooks, which would be lost; register hooks after sparsify"
    return None


def densify(model: ModuleT) -> ModuleT:
    """Replace every `CMSBlockLinear` of a model by an `nn.Linear` of the same function, in place.

    Returns:
        `model`, or its replacement if `model` itself is a `CMSBlockLinear`.

    Raises:
        ValueError: `model` is wrapped by DistributedDataParallel.
    """
    _refuse_wrapped(model, "densify")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CMSBlockLinear)}
    hooked = sorted(name for name, layer in layers.items() if _hooks(layer))
    if hooked:
        warnings.warn(
            f"densify dropped the hooks of {hooked}; register them again, on the dense layers.",
            stacklevel=2,
        )
    return _replace(model, {layer: layer.to_linear() for layer in layers.values()})


def _replace(model: ModuleT, new: Mapping[Any, Any]) -> ModuleT:
    """Put new modules wherever the old ones are: one may be used in several places."""
    if model in new:
        replacement: ModuleT = new[model]
        return replacement
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return model


def _hooks(module: nn.Module) -> bool:
    """Whether something happens when the module is called besides its class's `forward`."""
    held = vars(module)
    return "forward" in held or any(held[name] for name in _HOOKS)


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _listed(patterns))


def _matches_any(pattern: str, model: nn.Module) -> bool:
    return any(_matches(name, pattern) for name, _ in model.named_modules(remove_duplicate=False))
