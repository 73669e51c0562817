"""The configuration of a TitanMAC model: one frozen dataclass, checked when it is made."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import _checks as checks
from ._presets import PRESETS


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
    """Probability of dropout after the embedding, the attention and the MLP, of links between
    tokens, and of what a memory reads and answers."""
    tie_weights: bool = True
    """Whether the output head shares the embedding matrix."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    rope_base: float = 10_000.0
    """Base of the geometric series of rotary wavelengths."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-partition in the loss (keeps logits small in bfloat16); 0: off."""
    activation_checkpointing: bool = False
    """Whether training recomputes each block in the backward pass instead of keeping it."""

    use_neural_memory: bool = False
    """Whether layers have a neural memory that learns while it reads, in training and after."""
    titans_variant: Literal["MAC", "MAG", "MAL"] = "MAC"
    """How memory and attention meet: as context, as a gate, or as a layer before attention."""
    segment_size: int = 512
    """MAC: tokens per segment; a token attends within its segment and asks memory for the rest."""
    memory_layers: tuple[int, ...] | None = None
    """Indices of the layers with a memory, from 0; None (as a flag: all) for all."""
    memory_heads: int = 4
    """Memories per layer, each with its own keys, values and gates."""
    memory_width: int = 64
    """Width of the keys and values of one memory."""
    memory_depth: int = 1
    """1: a memory is a matrix; 2: an MLP with a hidden layer of twice the width."""
    memory_chunk_size: int = 64
    """Tokens computed at once; with depth 2 their gradients are taken at the chunk's start."""

    use_block_sparse: bool = False
    """Whether the chosen linear layers are ``CMSBlockLinear``; False makes every layer dense."""
    block_sparse_tile_size: int = 16
    """Side of a tile: 8, 16, 32, 64 or 128."""
    block_sparse_density: float | Mapping[int, float] = 0.5
    """Share of the blocks that live, in [0.1, 1.0]; or one density per layer index."""
    block_sparse_layers: tuple[int, ...] | None = (8, 9, 10, 11, 12)
    """Indices of the layers with block-sparse parts, from 0; None (as a flag: all) for all."""
    block_sparse_components: tuple[str, ...] = ("mlp",)
    """Which parts are block-sparse: "mlp" (fc1, fc2), "attention" (qkv and output)."""
    block_sparse_row_group: int | Literal["auto"] = "auto"
    """Block rows that share their columns; "auto" lets the layer choose."""
    block_sparse_candidate_score: str = "gradient"
    """How absent blocks are scored: "gradient" (exact norms) or "outer" (calibrated proxy)."""
    block_sparse_swap_threshold: float = 1.5
    """An absent block replaces a present one if its score exceeds this multiple; at least 1."""
    block_sparse_min_swap_frac: float = 0.01
    """Share of a layer's live blocks that every decision replaces at least; in [0, 0.05]."""
    block_sparse_keep_score: str = "magnitude"
    """How live blocks are scored: "magnitude" (of the weights), "gradient" or "taylor"."""
    block_sparse_birth: str = "zeros"
    """Weights of a newborn block: "zeros" (no output changes) or "kaiming" (small random ones)."""
    block_sparse_max_density: float | None = None
    """Share of the blocks there is storage for, to grow into; None for no more than live."""

    def __post_init__(self) -> None:
        for name, value in (
            (
                "block_sparse_layers",
                checks.normalise_layers("block_sparse_layers", self.block_sparse_layers),
            ),
            ("memory_layers", checks.normalise_layers("memory_layers", self.memory_layers)),
            (
                "block_sparse_components",
                checks.normalise_components(self.block_sparse_components),
            ),
            ("block_sparse_density", checks.normalise_density(self.block_sparse_density)),
        ):
            object.__setattr__(self, name, value)
        checks.check_shape(self)
        checks.check_memory(self)
        checks.check_block_sparse(self)
        if self.use_block_sparse:
            checks.check_block_sparse_layers(self)

    # -- presets and JSON ------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TitanMACConfig":
        """The named configuration with some fields replaced.

        ``demo``: two block-sparse layers, learns two-digit sums on a CPU in about a minute.
        ``small``: bytes, width 384, 6 layers, memory as a gate; for one GPU.
        ``titanmac-163m``: d_model 640, 16 layers, tied vocabulary of 128,000.
        ``titanmac-237m``: d_model 768, 16 layers, d_ff 4096, the same vocabulary.
        """
        if name not in PRESETS:
            raise ValueError(f"preset (={name!r}) must be one of {', '.join(sorted(PRESETS))}.")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes; :meth:`from_dict` makes an equal object of it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for key in ("block_sparse_layers", "block_sparse_components", "memory_layers"):
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

    def has_memory(self, layer: int) -> bool:
        """Whether ``layer`` has a neural memory."""
        return self.use_neural_memory and (
            self.memory_layers is None or layer in self.memory_layers
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
