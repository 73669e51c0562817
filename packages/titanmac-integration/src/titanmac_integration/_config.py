"""The configuration of a TitanMAC model: one frozen dataclass, checked when it is made."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TILE_SIZES = (8, 16, 32, 64, 128)
COMPONENTS = ("mlp", "attention")
CANDIDATE_SCORES = ("gradient", "outer")
DENSITY_RANGE = (0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class TitanMACConfig:
    """Shape of a TitanMAC model and of its block-sparse layers.

    Every field is checked on construction; a wrong one raises ``ValueError`` with the field, its
    value, the rule and a remedy. Presets: :meth:`preset`. JSON: :meth:`to_dict`,
    :meth:`from_dict`.
    """

    vocab_size: int = 256
    """Number of tokens; 256 is the byte-level vocabulary."""
    d_model: int = 640
    """Width of the residual stream; a multiple of ``2 * n_heads`` (rotary pairs)."""
    n_heads: int = 10
    """Attention heads per layer."""
    n_layers: int = 16
    """Number of transformer blocks."""
    d_ff: int = 2560
    """Width between the two linear layers of the MLP."""
    max_seq_len: int = 4096
    """Longest sequence that ``forward`` takes, in tokens, persistent tokens not counted."""
    window_size: int = 512
    """A token attends to this many tokens: itself and those before it."""
    n_persistent: int = 16
    """Learned tokens that all tokens may attend to, whatever the window; 0 for none."""
    dropout: float = 0.0
    """Probability of dropout after the embedding, the attention and the MLP."""
    tie_weights: bool = True
    """Whether the output head shares the embedding matrix."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    rope_base: float = 10_000.0
    """Base of the geometric series of rotary wavelengths."""

    use_block_sparse: bool = False
    """Whether the chosen linear layers are ``CMSBlockLinear``; False makes every layer dense."""
    block_sparse_tile_size: int = 16
    """Side of a tile: 8, 16, 32, 64 or 128."""
    block_sparse_density: float | Mapping[int, float] = 0.5
    """Share of the blocks that live, in [0.1, 1.0]; or one density per layer index."""
    block_sparse_layers: tuple[int, ...] | None = (8, 9, 10, 11, 12)
    """Indices of the layers with block-sparse parts, from 0; None for all layers."""
    block_sparse_components: tuple[str, ...] = ("mlp",)
    """Which parts are block-sparse: "mlp" (fc1, fc2), "attention" (qkv and output)."""
    block_sparse_row_group: int | Literal["auto"] = "auto"
    """Block rows that share their columns; "auto" lets the layer choose."""
    block_sparse_candidate_score: str = "gradient"
    """How absent blocks are scored: "gradient" (exact norms) or "outer" (calibrated proxy)."""
    block_sparse_swap_threshold: float = 1.5
    """An absent block replaces a present one if its score exceeds this multiple; at least 1."""

    def __post_init__(self) -> None:
        self._check_shape()
        self._normalise_sequences()
        self._check_block_sparse()
        if self.use_block_sparse:
            self._check_layers()

    # -- presets and JSON ------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TitanMACConfig":
        """The named configuration with some fields replaced.

        ``demo``: two block-sparse layers, learns two-digit sums on a CPU in about a minute.
        ``titanmac-163m``: d_model 640, 16 layers, tied vocabulary of 128,000.
        """
        if name not in PRESETS:
            raise ValueError(f"preset (={name!r}) must be one of {', '.join(sorted(PRESETS))}.")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes; :meth:`from_dict` makes an equal object of it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for key in ("block_sparse_layers", "block_sparse_components"):
            values[key] = None if values[key] is None else list(values[key])
        if isinstance(self.block_sparse_density, Mapping):
            values["block_sparse_density"] = {
                str(layer): value for layer, value in self.block_sparse_density.items()
            }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TitanMACConfig":
        """The inverse of :meth:`to_dict`; unknown names raise ``ValueError``."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"configuration names (={', '.join(map(repr, unknown))}) must be fields of "
                f"TitanMACConfig; known: {', '.join(sorted(known))}."
            )
        return cls(**values)

    def replace(self, **changes: Any) -> "TitanMACConfig":
        """A copy with some fields changed, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    # -- questions a model asks ------------------------------------------------------------

    def is_block_sparse(self, layer: int, component: str) -> bool:
        """Whether ``component`` ("mlp" or "attention") of ``layer`` is block-sparse."""
        layers = self.block_sparse_layers
        return (
            self.use_block_sparse
            and component in self.block_sparse_components
            and (layers is None or layer in layers)
        )

    def density_of(self, layer: int) -> float:
        """Density of the block-sparse parts of ``layer``."""
        if isinstance(self.block_sparse_density, Mapping):
            return self.block_sparse_density[layer]
        return self.block_sparse_density

    def block_sparse_layer_indices(self) -> tuple[int, ...]:
        """Indices of the layers with block-sparse parts; empty when the model is dense."""
        if not self.use_block_sparse:
            return ()
        if self.block_sparse_layers is None:
            return tuple(range(self.n_layers))
        return self.block_sparse_layers

    # -- checks ----------------------------------------------------------------------------

    def _check_shape(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "n_heads",
            "n_layers",
            "d_ff",
            "max_seq_len",
            "window_size",
        ):
            _check_int(name, getattr(self, name), minimum=1)
        _check_int("n_persistent", self.n_persistent, minimum=0)
        for name in ("tie_weights", "use_block_sparse"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be True or False.")
        step = 2 * self.n_heads
        if self.d_model % step:
            below = self.d_model // step * step
            nearest = f"{below} or {below + step}" if below else f"{step}"
            raise ValueError(
                f"d_model (={self.d_model}) must be a multiple of 2 * n_heads (={step}); "
                f"nearest: {nearest}."
            )
        _check_float("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout (={self.dropout}) must be in [0, 1); 0 switches dropout off."
            )
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            _check_float(name, value)
            if not value > 0.0:
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name} (={value}) must be above 0; the default is {default}.")

    def _normalise_sequences(self) -> None:
        """Lists (JSON has no tuples) become tuples; string keys of densities become indices."""
        layers = self.block_sparse_layers
        if layers is not None:
            if not isinstance(layers, (list, tuple)):
                raise ValueError(
                    f"block_sparse_layers (={layers!r}) must be a tuple of layer indices or None "
                    "for all layers."
                )
            object.__setattr__(self, "block_sparse_layers", tuple(layers))
        components = self.block_sparse_components
        if not isinstance(components, (list, tuple)):
            raise ValueError(
                f"block_sparse_components (={components!r}) must be a tuple out of "
                f'"mlp" and "attention", for example ("mlp",).'
            )
        object.__setattr__(self, "block_sparse_components", tuple(components))

    def _check_block_sparse(self) -> None:
        if self.block_sparse_tile_size not in TILE_SIZES:
            raise ValueError(
                f"block_sparse_tile_size (={self.block_sparse_tile_size!r}) must be one of "
                f"{', '.join(map(str, TILE_SIZES))}."
            )
        if not self.block_sparse_components:
            raise ValueError(
                "block_sparse_components (=()) must name at least one part; for a dense model "
                "set use_block_sparse=False."
            )
        for component in self.block_sparse_components:
            if component not in COMPONENTS:
                raise ValueError(
                    f"block_sparse_components (={self.block_sparse_components!r}) must be out of "
                    f"{', '.join(COMPONENTS)}; {component!r} is not."
                )
        if self.block_sparse_candidate_score not in CANDIDATE_SCORES:
            raise ValueError(
                f"block_sparse_candidate_score (={self.block_sparse_candidate_score!r}) must be "
                f"one of {', '.join(CANDIDATE_SCORES)}."
            )
        threshold = self.block_sparse_swap_threshold
        _check_float("block_sparse_swap_threshold", threshold)
        if threshold < 1.0:
            raise ValueError(
                f"block_sparse_swap_threshold (={threshold}) must be at least 1; below it, blocks "
                "would be replaced by worse ones."
            )
        group = self.block_sparse_row_group
        if group != "auto":
            if isinstance(group, str):
                raise ValueError(
                    f'block_sparse_row_group (={group!r}) must be "auto" or a positive integer.'
                )
            _check_int("block_sparse_row_group", group, minimum=1)
        density = self.block_sparse_density
        if isinstance(density, Mapping):
            by_layer = {_layer_key(key): value for key, value in density.items()}
            by_layer = dict(sorted(by_layer.items()))
            object.__setattr__(self, "block_sparse_density", by_layer)
            for layer, value in by_layer.items():
                _check_density(f"block_sparse_density[{layer}]", value)
        else:
            _check_density("block_sparse_density", density)

    def _check_layers(self) -> None:
        for layer in self.block_sparse_layers or ():
            _check_int("block_sparse_layers", layer, minimum=0)
            if layer >= self.n_layers:
                raise ValueError(
                    f"block_sparse_layers (={self.block_sparse_layers}) must be below n_layers "
                    f"(={self.n_layers}); pass None for all layers."
                )
        if self.block_sparse_layers is not None:
            if not self.block_sparse_layers:
                raise ValueError(
                    "block_sparse_layers (=()) must name at least one layer; pass None for all "
                    "layers or set use_block_sparse=False."
                )
            if len(set(self.block_sparse_layers)) != len(self.block_sparse_layers):
                raise ValueError(
                    f"block_sparse_layers (={self.block_sparse_layers}) must not repeat a layer."
                )
        if isinstance(self.block_sparse_density, Mapping):
            given = set(self.block_sparse_density)
            wanted = set(self.block_sparse_layer_indices())
            if given != wanted:
                raise ValueError(
                    f"block_sparse_density (layers {sorted(given)}) must name exactly the "
                    f"block-sparse layers {sorted(wanted)}."
                )
        tile = self.block_sparse_tile_size
        names = ["d_model"] + (["d_ff"] if "mlp" in self.block_sparse_components else [])
        for name in names:
            value = getattr(self, name)
            if value % tile:
                below = value // tile * tile
                nearest = f"{below} or {below + tile}" if below else f"{tile}"
                raise ValueError(
                    f"{name} (={value}) must be a multiple of block_sparse_tile_size (={tile}); "
                    f"nearest: {nearest}."
                )


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "d_model": 96,
        "n_heads": 8,
        "n_layers": 2,
        "d_ff": 384,
        "max_seq_len": 256,
        "window_size": 32,
        "n_persistent": 2,
        "use_block_sparse": True,
        "block_sparse_layers": None,
        "block_sparse_row_group": 1,
        # Layers this small have few blocks to choose from, so their scores lie close together.
        "block_sparse_swap_threshold": 1.1,
    },
    "titanmac-163m": {
        "vocab_size": 128_000,
        "d_model": 640,
        "n_heads": 10,
        "n_layers": 16,
        "d_ff": 2560,
        "tie_weights": True,
    },
}


def _check_int(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} (={value!r}) must be an integer of at least {minimum}.")


def _check_float(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} (={value!r}) must be a finite number.")


def _check_density(name: str, value: object) -> None:
    low, high = DENSITY_RANGE
    _check_float(name, value)
    assert isinstance(value, (int, float))
    if not low <= value <= high:
        raise ValueError(
            f"{name} (={value}) must be in [{low}, {high}]; use 0.5 for half of the blocks."
        )


def _layer_key(key: object) -> int:
    """A layer index; JSON turns integer keys into strings."""
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(
            f"block_sparse_density (key {key!r}) must be keyed by layer index, for example "
            "{0: 0.5, 1: 0.25}."
        )
    return key
