"""The rules that a TitanMACConfig keeps, and the messages when it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._config import TitanMACConfig

TILE_SIZES = (8, 16, 32, 64, 128)
COMPONENTS = ("mlp", "attention")
CHOICES = {
    "block_sparse_candidate_score": ("gradient", "outer"),
    "block_sparse_keep_score": ("magnitude", "gradient", "taylor"),
    "block_sparse_birth": ("zeros", "kaiming"),
}
VARIANTS = ("MAC", "MAG", "MAL")
MEMORY_DEPTHS = (1, 2)
DENSITY_RANGE = (0.1, 1.0)
MAX_SWAP_FRAC = 0.05
"""The default of `ScoringConfig.max_swap_frac`, which configurations do not change."""
POSITIVE_INTEGERS = (
    "vocab_size",
    "d_model",
    "n_heads",
    "n_layers",
    "d_ff",
    "max_seq_len",
    "window_size",
    "segment_size",
    "memory_heads",
    "memory_width",
    "memory_chunk_size",
)
FLAGS = ("tie_weights", "use_block_sparse", "use_neural_memory", "activation_checkpointing")


def check_shape(config: TitanMACConfig) -> None:
    """Sizes, probabilities and switches of the transformer."""
    for name in POSITIVE_INTEGERS:
        check_int(name, getattr(config, name), minimum=1)
    check_int("n_persistent", config.n_persistent, minimum=0)
    for name in FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} (={getattr(config, name)!r}) must be True or False.")
    step = 2 * config.n_heads
    if config.d_model % step:
        raise ValueError(
            f"d_model (={config.d_model}) must be a multiple of 2 * n_heads (={step}); "
            f"nearest: {_nearest(config.d_model, step)}."
        )
    check_float("dropout", config.dropout)
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout (={config.dropout}) must be in [0, 1); 0 switches dropout off.")
    for name in ("norm_eps", "rope_base"):
        value = getattr(config, name)
        check_float(name, value)
        if not value > 0.0:
            default = type(config).__dataclass_fields__[name].default
            raise ValueError(f"{name} (={value}) must be above 0; the default is {default}.")
    check_float("z_loss_weight", config.z_loss_weight)
    if config.z_loss_weight < 0.0:
        raise ValueError(f"z_loss_weight (={config.z_loss_weight}) must be 0 (off) or more.")


def check_memory(config: TitanMACConfig) -> None:
    """The neural memory; what only matters when it is on is looked at only then."""
    if config.titans_variant not in VARIANTS:
        raise ValueError(
            f"titans_variant (={config.titans_variant!r}) must be one of {', '.join(VARIANTS)}."
        )
    if isinstance(config.memory_depth, bool) or config.memory_depth not in MEMORY_DEPTHS:
        raise ValueError(
            f"memory_depth (={config.memory_depth!r}) must be 1 (a matrix) or 2 (an MLP with one "
            "hidden layer)."
        )
    if not config.use_neural_memory:
        return
    check_layer_indices("memory_layers", config.memory_layers, config.n_layers)
    if config.memory_layers == ():
        raise ValueError(
            "memory_layers (=()) must name at least one layer; pass None for all layers or set "
            "use_neural_memory=False."
        )
    chunk = config.memory_chunk_size
    if config.titans_variant == "MAC" and config.segment_size % chunk:
        raise ValueError(
            f"segment_size (={config.segment_size}) must be a multiple of memory_chunk_size "
            f"(={chunk}); nearest: {_nearest(config.segment_size, chunk)}."
        )


def check_block_sparse(config: TitanMACConfig) -> None:
    """What can be said about the block-sparse fields without knowing whether they are used."""
    if config.block_sparse_tile_size not in TILE_SIZES:
        raise ValueError(
            f"block_sparse_tile_size (={config.block_sparse_tile_size!r}) must be one of "
            f"{', '.join(map(str, TILE_SIZES))}."
        )
    if not config.block_sparse_components:
        raise ValueError(
            "block_sparse_components (=()) must name at least one part; for a dense model "
            "set use_block_sparse=False."
        )
    for component in config.block_sparse_components:
        if component not in COMPONENTS:
            raise ValueError(
                f"block_sparse_components (={config.block_sparse_components!r}) must be out of "
                f"{', '.join(COMPONENTS)}; {component!r} is not."
            )
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(allowed)}.")
    threshold = config.block_sparse_swap_threshold
    check_float("block_sparse_swap_threshold", threshold)
    if threshold < 1.0:
        raise ValueError(
            f"block_sparse_swap_threshold (={threshold}) must be at least 1; below it, blocks "
            "would be replaced by worse ones."
        )
    floor = config.block_sparse_min_swap_frac
    check_float("block_sparse_min_swap_frac", floor)
    if not 0.0 <= floor <= MAX_SWAP_FRAC:
        raise ValueError(
            f"block_sparse_min_swap_frac (={floor}) must be in [0, {MAX_SWAP_FRAC}]: no decision "
            "replaces more than that share of a layer."
        )
    group = config.block_sparse_row_group
    if group != "auto":
        if isinstance(group, str):
            raise ValueError(
                f'block_sparse_row_group (={group!r}) must be "auto" or a positive integer.'
            )
        check_int("block_sparse_row_group", group, minimum=1)
    _check_densities(config)


def _check_densities(config: TitanMACConfig) -> None:
    density = config.block_sparse_density
    if isinstance(density, Mapping):
        for layer, value in density.items():
            check_density(f"block_sparse_density[{layer}]", value)
        largest = max(density.values(), default=0.0)
    else:
        check_density("block_sparse_density", density)
        largest = density
    spare = config.block_sparse_max_density
    if spare is not None:
        check_density("block_sparse_max_density", spare)
        if spare < largest:
            raise ValueError(
                f"block_sparse_max_density (={spare}) must be at least block_sparse_density "
                f"(={largest}); None means no spare capacity."
            )


def check_block_sparse_layers(config: TitanMACConfig) -> None:
    """What a model with block-sparse layers needs."""
    layers = config.block_sparse_layers
    check_layer_indices("block_sparse_layers", layers, config.n_layers)
    if layers == ():
        raise ValueError(
            "block_sparse_layers (=()) must name at least one layer; pass None for all "
            "layers or set use_block_sparse=False."
        )
    if isinstance(config.block_sparse_density, Mapping):
        given = set(config.block_sparse_density)
        wanted = set(config.block_sparse_layer_indices())
        if given != wanted:
            raise ValueError(
                f"block_sparse_density (layers {sorted(given)}) must name exactly the "
                f"block-sparse layers {sorted(wanted)}."
            )
    tile = config.block_sparse_tile_size
    names = ["d_model"] + (["d_ff"] if "mlp" in config.block_sparse_components else [])
    for name in names:
        value = getattr(config, name)
        if value % tile:
            raise ValueError(
                f"{name} (={value}) must be a multiple of block_sparse_tile_size (={tile}); "
                f"nearest: {_nearest(value, tile)}."
            )
    group = config.block_sparse_row_group
    for name in names:
        rows = getattr(config, name) // tile
        if group != "auto" and rows % group:
            raise ValueError(
                f"block_sparse_row_group (={group}) must divide {name} / block_sparse_tile_size "
                f'(={rows}), the block rows of a layer; "auto" chooses a divisor.'
            )


def check_layer_indices(name: str, layers: tuple[int, ...] | None, n_layers: int) -> None:
    """Distinct indices below ``n_layers``; None stands for all."""
    for layer in layers or ():
        check_int(name, layer, minimum=0)
        if layer >= n_layers:
            raise ValueError(
                f"{name} (={layers}) must be below n_layers (={n_layers}); pass None for all "
                "layers."
            )
    if layers is not None and len(set(layers)) != len(layers):
        raise ValueError(f"{name} (={layers}) must not repeat a layer.")


def check_int(name: str, value: object, *, minimum: int) -> None:
    """An int, not a bool, not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} (={value!r}) must be an integer of at least {minimum}.")


def check_float(name: str, value: object) -> None:
    """A finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} (={value!r}) must be a finite number.")


def check_density(name: str, value: object) -> None:
    """A number in ``DENSITY_RANGE``."""
    low, high = DENSITY_RANGE
    check_float(name, value)
    assert isinstance(value, (int, float))
    if not low <= value <= high:
        raise ValueError(
            f"{name} (={value}) must be in [{low}, {high}]; use 0.5 for half of the blocks."
        )


def normalise_layers(name: str, value: object) -> tuple[int, ...] | None:
    """Lists (JSON has no tuples) become tuples."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{name} (={value!r}) must be a tuple of layer indices or None for all layers."
        )
    return tuple(value)


def normalise_components(value: object) -> tuple[str, ...]:
    """Lists become tuples; a bare string would be taken apart into letters."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"block_sparse_components (={value!r}) must be a tuple out of "
            f'"mlp" and "attention", for example ("mlp",).'
        )
    return tuple(value)


def normalise_density(value: object) -> object:
    """Keys of a mapping become layer indices in order; JSON turns integer keys into strings."""
    if not isinstance(value, Mapping):
        return value
    return dict(sorted((_layer_key(key), density) for key, density in value.items()))


def _layer_key(key: object) -> int:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(
            f"block_sparse_density (key {key!r}) must be keyed by layer index, for example "
            "{0: 0.5, 1: 0.25}."
        )
    return key


def _nearest(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"
