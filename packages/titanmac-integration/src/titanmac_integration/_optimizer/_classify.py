"""What a parameter is, read from the module that holds it, and parameter groups made of that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from cms_topology import CMSBlockLinear, sparse_layers

from ._cms import ContinuumMemorySystem, plain_names

Kind = Literal["matrix", "embedding", "norm", "bias", "other"]

_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TABLES = ("persistent", "embedding", "embed", "pos_emb")


def discover_block_sparse_layers(model: nn.Module) -> dict[str, CMSBlockLinear]:
    """All block-sparse layers of a model by name, without the prefixes of DDP and torch.compile."""
    return sparse_layers(model)


def classify_parameters(model: nn.Module) -> dict[str, Kind]:
    """What every parameter of a model is: by the type of its module, not by its shape.

    | kind | which |
    |---|---|
    | matrix | weights of linear, convolution, recurrent and attention layers; the 4-D `values` of a
      `CMSBlockLinear` |
    | embedding | `nn.Embedding`, also when the head shares it; tables of learned tokens |
    | norm | all parameters of normalisation layers |
    | bias | biases |
    | other | anything else with fewer than two dimensions: gates, scales |

    Weight decay makes sense for matrices only. Names come without what DDP, torch.compile and
    other wrappers put into them; a parameter that two modules share appears once, under its first
    name.
    """
    kinds: dict[str, Kind] = {}
    seen: set[Tensor] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            full = f"{module_name}.{name}" if module_name else name
            kinds[full] = _kind(module, name, parameter)
    return {plain: kinds[full] for full, plain in plain_names(kinds).items()}


def _kind(module: nn.Module, name: str, parameter: Tensor) -> Kind:
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return "norm"
    if name == "bias" or name.endswith(("_bias", ".bias")) or name.startswith("bias"):
        return "bias"
    if isinstance(module, CMSBlockLinear):
        return "matrix"
    if name.startswith(_TABLES):
        return "embedding"
    return "matrix" if parameter.ndim >= 2 else "other"


def groups_of_model(
    model: nn.Module, cms: ContinuumMemorySystem, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups by level and by whether weight decay applies; empty ones are left out."""
    full = dict(model.named_parameters())
    named = {plain: full[name] for name, plain in plain_names(full).items()}
    kinds, levels = classify_parameters(model), cms.assign(named.items())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        decayed = kinds[name] == "matrix"
        group = groups.setdefault(
            (levels[name], decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "level": levels[name],
            },
        )
        group["params"].append((name, parameter))
    if not groups:
        raise ValueError(
            f"params_or_model (={type(model).__name__}) holds no parameter that requires a "
            "gradient."
        )
    return [groups[key] for key in sorted(groups)]


def groups_of_parameters(
    parameters: Iterable[Any], cms: ContinuumMemorySystem
) -> list[dict[str, Any]]:
    """What the user gave, as groups; split by level where `cms` assigns levels by name.

    Raises:
        ValueError: `cms` assigns levels by name, but the parameters came without names.
    """
    given = list(parameters)
    if not given:
        raise ValueError("params_or_model (empty) must hold at least one parameter.")
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    if not cms.assigns:
        return [dict(group) for group in groups]
    named = [_named(group) for group in groups]
    cms.assign(pair for pairs in named for pair in pairs)
    split = []
    for group, pairs in zip(groups, named, strict=True):
        by_level: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in pairs:
            by_level.setdefault(cms.level_of(name, parameter), []).append((name, parameter))
        for level in sorted(by_level):
            split.append({**group, "params": by_level[level], "level": level})
    return split


def _named(group: dict[str, Any]) -> Sequence[tuple[str, Tensor]]:
    entries = group["params"]
    entries = [entries] if isinstance(entries, Tensor) else list(entries)
    if not all(isinstance(entry, tuple) for entry in entries):
        raise ValueError(
            "params (tensors without names) must come with names when cms assigns levels by name; "
            "pass the model or model.named_parameters(), or set 'level' in each parameter group."
        )
    group["params"] = entries
    return entries
