"""Growth for a new task, where the old ones mind least.

Legend: R block rows, C block columns, B tile side, G row groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blockell_format import num_blocks_for_density
from cms_topology._birth import reset_optimizer_state
from cms_topology._convert import sparse_layers
from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._compensation import RIDGE
from cms_topology._retention._consolidation import Consolidation, LayerMemory
from cms_topology._retention._names import parameter_names

PREFERENCES = ("energy", "freedom", "random")


@torch.no_grad()
def grow_for_task(
    model: nn.Module,
    memory: Consolidation,
    density: float,
    *,
    prefer: str = "energy",
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Bring spare blocks of every sparse layer to life, at zero: no output changes by a bit.

    Layers that already have `density` are left alone. Do this before a `RetentionGuard` is built,
    or with it attached: it notices.

    Args:
        model: with `CMSBlockLinear` layers whose `max_density` leaves room.
        memory: of the tasks to respect.
        density: share of blocks present afterwards, at most every layer's `max_density`.
        prefer: columns to grow in. "energy": where the old tasks' inputs have least energy.
            "freedom": where the row's other inputs predict them best, so that a combination exists
            that the old tasks do not notice. "random": drawn from `generator`.
        optimizers: whose state of the new slots is reset.
        generator: source of "random", and of layers the memory does not know.

    Returns:
        New blocks per row, by layer name.

    Raises:
        ValueError: no sparse layer, a `density` without room for it, an unknown preference.
    """
    if prefer not in PREFERENCES:
        raise ValueError(
            f"prefer (={prefer!r}) must be one of {', '.join(map(repr, PREFERENCES))}."
        )
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"model (={type(model).__name__}) has no CMSBlockLinear layer to grow; make some with "
            "cms_topology.sparsify(model, density=..., max_density=...)."
        )
    listed = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    names = parameter_names(model)
    grown = {}
    for name, layer in layers.items():
        before = layer.num_live
        if num_blocks_for_density(layer.C, density) <= before:
            grown[name] = 0
            continue
        known = memory.layers.get(names[layer.values])
        scores = None if known is None else _scores(layer, known, prefer, generator)
        grown[name] = layer.grow(density, generator, scores=scores)
        new = torch.zeros(layer.R, layer.num_live, dtype=torch.bool, device=layer.values.device)
        new[:, before:] = True
        reset_optimizer_state(listed, layer.values, new)
    return grown


def _scores(
    layer: CMSBlockLinear, memory: LayerMemory, prefer: str, generator: torch.Generator | None
) -> Tensor:
    """Where to grow, [R, C]: larger is better."""
    device = layer.values.device
    if prefer == "random":
        source = generator.device if generator is not None else device
        drawn = torch.rand(layer.R // layer.row_group, layer.C, generator=generator, device=source)
        return (drawn.to(device) + 0.5).repeat_interleave(layer.row_group, 0)
    K = memory.covariance.to(device).dense()
    if prefer == "energy":
        noticed = K.diagonal().view(1, layer.C, layer.B).sum(2).expand(layer.R, -1)
    else:
        noticed = _unpredicted(layer, K).repeat_interleave(layer.row_group, 0)
    return 1 / noticed.clamp(min=1e-12)


def _unpredicted(layer: CMSBlockLinear, K: Tensor) -> Tensor:
    """Energy of every block column that the row's live inputs do not predict, [G, C]."""
    live = layer.col_indices[:: layer.row_group, : layer.num_live].long()
    within = torch.arange(layer.B, device=live.device)
    columns = (live[:, :, None] * layer.B + within).flatten(1)
    inside = K[columns[:, :, None], columns[:, None, :]]
    inside.diagonal(dim1=1, dim2=2).add_(RIDGE * K.diagonal().mean())
    across = K[columns]  # [G, k * B, n]
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inside), across, upper=False)
    left = (K.diagonal() - half.square().sum(1)).clamp(min=0)
    return left.view(-1, layer.C, layer.B).sum(2)
