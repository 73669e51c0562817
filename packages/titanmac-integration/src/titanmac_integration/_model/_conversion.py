"""From a trained dense model to a block-sparse one and back."""

import copy
from typing import Any

import torch
from torch import nn

from cms_topology import CMSBlockLinear, densify
from titanmac_integration._layers._linear import sparse_options

from ._titanmac import TitanMAC

PARTS = {
    "mlp": (("mlp", "fc1"), ("mlp", "fc2")),
    "attention": (("attention", "qkv"), ("attention", "out")),
}


def to_block_sparse(model: TitanMAC, **changes: Any) -> TitanMAC:
    """A copy of ``model`` whose chosen layers are block-sparse and keep their strongest blocks.

    Each layer keeps, in every block row (or group of rows), the blocks of largest Frobenius norm;
    all other weights are copied. At density 1 the outputs are those of ``model``. Build the
    optimizer afterwards: the parameters are new, and so are the scores.

    Args:
        model: dense or block-sparse (absent blocks count as zeros); it is not changed.
        **changes: fields of the configuration, such as ``block_sparse_density=0.5`` and
            ``block_sparse_layers=None``; only fields whose name starts with "block_sparse".

    Returns:
        a model with the configuration that says so, on the same device, dtype and mode.

    Raises:
        ValueError: a field of another kind, or a configuration that does not fit.
    """
    for name in changes:
        if not name.startswith("block_sparse_"):
            raise ValueError(
                f"changes (={name}) must be fields that start with block_sparse_; others would "
                "need other weights."
            )
    config = model.config.replace(use_block_sparse=True, **changes)
    new = _dense_copy(model)
    new.config = config
    with _undisturbed_randomness(model):
        for layer in config.block_sparse_layer_indices():
            for component in config.block_sparse_components:
                for module, linear in PARTS[component]:
                    parent = getattr(new.blocks[layer], module)
                    dense = getattr(parent, linear)
                    assert isinstance(dense, nn.Linear)
                    options = sparse_options(config, layer)
                    setattr(parent, linear, CMSBlockLinear.from_dense(dense, **options))
    return new


def to_dense(model: TitanMAC) -> TitanMAC:
    """A dense copy of ``model`` with the same outputs; absent blocks become zeros.

    The copy's configuration says ``use_block_sparse=False``; ``model`` is not changed.
    """
    new = _dense_copy(model)
    new.config = model.config.replace(use_block_sparse=False)
    return new


def _dense_copy(model: TitanMAC) -> TitanMAC:
    with _undisturbed_randomness(model):
        return densify(copy.deepcopy(model))


def _undisturbed_randomness(model: TitanMAC) -> Any:
    """New layers draw weights before theirs are written; global randomness shall not notice."""
    device = model.embedding.weight.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
