"""Causal multi-head attention with rotary positions, persistent tokens and a cache.

Legend: S batch, P persistent tokens, T tokens of the sequence, L = P + T, H heads, D head width.
The P persistent tokens come first, so position i of the sequence is row P + i.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._layers._linear import make_linear
from titanmac_integration._layers._project import has_hooks, project, project_apart, project_from
from titanmac_integration._layers._rotary import Rotary, turned_parts
from titanmac_integration._state import Cache

from ._window import (
    SegmentPlan,
    WindowPlan,
    near_mask,
    segment_attention,
    takes_heads,
    takes_segments,
    turned_attention_,
    turned_segment_attention_,
    window_attention,
)


class Pass(NamedTuple):
    """What the layers of one forward pass share."""

    rotary: Rotary
    """Of the rows: P + T of them, or T with a state."""
    window: WindowPlan | None
    """For layers without retrieval; None with a state."""
    segments: SegmentPlan | None
    """For layers with retrieval (MAC); None with a state."""
    position: int
    """Tokens before the first one."""
    keep_state: bool
    """Whether layers return their state."""


class CausalWindowAttention(nn.Module):
    """Multi-head attention over a causal window or, given retrieved tokens, over segments."""

    def __init__(
        self, config: TitanMACConfig, layer: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_persistent = config.n_persistent
        self.window, self.segment = config.window_size, config.segment_size
        self.dropout = config.dropout
        width = config.d_model
        self.qkv = make_linear(config, layer, "attention", width, 3 * width, generator=generator)
        self.out = make_linear(config, layer, "attention", width, width, generator=generator)

    def forward(
        self, x: Tensor, run: Pass, retrieved: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        """``x`` [S, L, d_model] -> [S, L, d_model]; its bias; the cache if ``run`` keeps the state.

        The bias [d_model] is still to be added to the first; None where that is done.
        With a cache, ``x`` are the T tokens after the cached ones (with retrieval: of one segment).
        ``retrieved`` [S, T, d_model] is what the memory says to each token (MAC).
        """
        heads = self._project(x)
        dropout = self.dropout if self.training else 0.0
        if not run.keep_state and not has_hooks(self.qkv):
            mixed = self._attend_in_place(heads, run, retrieved, dropout)
            if mixed is not None:
                return *project_apart(self.out, mixed.transpose(1, 2).flatten(2)), None
        query, key, value = turned_parts(heads, run.rotary)
        recalled = None
        if retrieved is not None:
            # retrieved tokens are tokens of the attention like any other, at their token's position
            rows = slice(run.rotary[0].shape[0] - retrieved.shape[1], None)
            rotary = (run.rotary[0][rows], run.rotary[1][rows])
            recalled_key, recalled_value = turned_parts(self._project_retrieved(retrieved), rotary)
            recalled = (recalled_key, recalled_value)
        if cache is not None:
            mixed, cache = self._continue(query, (key, value), recalled, run, cache, dropout)
        elif recalled is not None:
            assert run.segments is not None
            mixed = segment_attention(query, key, value, recalled, run.segments, dropout)
        else:
            assert run.window is not None
            mixed = window_attention(query, key, value, run.window, dropout)
        if run.keep_state and cache is None:
            cache = self._first_cache((key, value), recalled)
        return *project_apart(self.out, mixed.transpose(1, 2).flatten(2)), cache

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: [S, L, 3, H, D]."""
        return project(self.qkv, x).unflatten(-1, (3, self.n_heads, -1))

    def _attend_in_place(
        self, heads: Tensor, run: Pass, retrieved: Tensor | None, dropout: float
    ) -> Tensor | None:
        """[S, H, L, D] of heads that nobody else needs, where kernels take them; otherwise None."""
        if retrieved is None:
            if run.window is None or not takes_heads(heads, dropout):
                return None
            return turned_attention_(heads, run.rotary, run.window)
        if run.segments is None or not takes_segments(heads, run.segments, dropout):
            return None
        told = self._project_retrieved(retrieved)
        return turned_segment_attention_(heads, told, run.rotary, run.segments)

    def _project_retrieved(self, retrieved: Tensor) -> Tensor:
        """Keys and values: [S, T, 2, H, D]."""
        both = project_from(self.qkv, retrieved, retrieved.shape[-1])
        return both.unflatten(-1, (2, self.n_heads, -1))

    def _first_cache(
        self, pair: tuple[Tensor, Tensor], recalled: tuple[Tensor, Tensor] | None
    ) -> Cache:
        P = self.n_persistent
        tokens = pair[0].shape[2] - P
        near = (pair[0][:, :, P:], pair[1][:, :, P:])
        return Cache(
            (pair[0][:, :, :P].clone(), pair[1][:, :, :P].clone()),
            self._last(near, tokens, recalled is not None),
            None if recalled is None else self._last(recalled, tokens, True),
        )

    def _last(
        self, pair: tuple[Tensor, Tensor], position: int, in_segment: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows that the token at ``position`` may see; a copy, so that the rest is freed."""
        wanted = min(self.window - 1, position % self.segment if in_segment else position)
        size = pair[0].shape[2]
        rows = slice(size - min(wanted, size), size)
        return pair[0][:, :, rows].clone(), pair[1][:, :, rows].clone()

    def _continue(
        self,
        query: Tensor,
        pair: tuple[Tensor, Tensor],
        recalled: tuple[Tensor, Tensor] | None,
        run: Pass,
        cache: Cache,
        dropout: float,
    ) -> tuple[Tensor, Cache]:
        tokens, cached = query.shape[2], cache.near[0].shape[2]
        near = _join(cache.near, pair)
        mask = near_mask(tokens, cached, window_size=self.window, device=query.device)
        parts = [cache.persistent]
        if recalled is not None:
            assert cache.retrieved is not None
            recalled = _join(cache.retrieved, recalled)
            parts.append(recalled)
        parts.append(near)
        mask = functional.pad(
            mask.repeat(1, len(parts) - 1), (cache.persistent[0].shape[2], 0), value=True
        )
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout
        )
        position = run.position + tokens
        return mixed, Cache(
            cache.persistent,
            self._last(near, position, recalled is not None),
            None if recalled is None else self._last(recalled, position, True),
        )


def _join(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of cached tokens, then of new ones."""
    return torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2)
