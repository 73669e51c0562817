"""The one place that decides whether a linear layer is dense or block-sparse."""

import math
from typing import Any

import torch
from torch import nn

from cms_topology import CMSBlockLinear, ScoringConfig
from titanmac_integration._config._config import TitanMACConfig


def make_linear(
    config: TitanMACConfig,
    layer: int,
    component: str,
    in_features: int,
    out_features: int,
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """``nn.Linear`` or ``CMSBlockLinear``, as ``config`` says for this layer and component."""
    if not config.is_block_sparse(layer, component):
        linear = nn.Linear(in_features, out_features)
        init_linear(linear, generator)
        return linear
    return CMSBlockLinear(
        in_features, out_features, generator=generator, **sparse_options(config, layer)
    )


def sparse_options(config: TitanMACConfig, layer: int) -> dict[str, Any]:
    """What the block-sparse parts of ``layer`` are made with."""
    return {
        "tile_size": config.block_sparse_tile_size,
        "density": config.density_of(layer),
        "max_density": config.block_sparse_max_density,
        "row_group": config.block_sparse_row_group,
        "scoring": ScoringConfig(
            candidate_score=config.block_sparse_candidate_score,
            swap_threshold=config.block_sparse_swap_threshold,
            min_swap_frac=config.block_sparse_min_swap_frac,
            keep_score=config.block_sparse_keep_score,
            birth=config.block_sparse_birth,
        ),
    }


def init_linear(linear: nn.Linear, generator: torch.Generator | None = None) -> None:
    """The initialisation of ``nn.Linear``, drawn from ``generator``."""
    bound = 1.0 / math.sqrt(linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
