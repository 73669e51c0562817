"""One layer: attention, MLP and, where configured, a neural memory beside them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titanmac_integration._attention._attention import CausalWindowAttention, Pass
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._layers._mlp import TitanMLP
from titanmac_integration._layers._norm import NormBeforeLinear
from titanmac_integration._memory import NeuralMemory
from titanmac_integration._state import LayerState


class Addend(NamedTuple):
    """What is still to be added to the residual stream."""

    value: Tensor
    """[S, L, d_model]."""
    bias: Tensor | None = None
    """[d_model]."""

    def plus(self, x: Tensor) -> Tensor:
        """``x`` with it."""
        return x + (self.value if self.bias is None else self.value + self.bias)


class TitanBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream, and perhaps a memory.

    The memory sees the tokens of the sequence, never the persistent ones (Titans, section 4):

    - MAC, memory as context: attention over [persistent, retrieved, segment], where a token's
      retrieved one is the answer of the memory as it was before the segment; then the memory
      learns the segment, and what it now answers is added through a gate.
    - MAG, memory as a gate: window attention and memory read the same tokens side by side; the
      memory's answer is added through a gate.
    - MAL, memory as a layer: the memory comes first, attention reads its output.
    """

    def __init__(
        self, config: TitanMACConfig, layer: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.n_persistent = config.n_persistent
        self.variant = config.titans_variant if config.has_memory(layer) else None
        self.norm_attention = NormBeforeLinear(config.d_model, eps=config.norm_eps)
        self.attention = CausalWindowAttention(config, layer, generator=generator)
        self.norm_mlp = NormBeforeLinear(config.d_model, eps=config.norm_eps)
        self.mlp = TitanMLP(config, layer, generator=generator)
        self.dropout = nn.Dropout(config.dropout)
        if self.variant is not None:
            self.memory = NeuralMemory(config, generator=generator)
        if self.variant in ("MAC", "MAL"):
            self.norm_memory = NormBeforeLinear(config.d_model, eps=config.norm_eps)
            """MAC: of retrieved tokens. MAL: of what the memory reads."""

    def forward(
        self,
        x: Tensor,
        run: Pass,
        state: LayerState | None = None,
        added: Addend | None = None,
    ) -> tuple[Tensor, Addend, Tensor | None, LayerState | None]:
        """One layer for [S, P + T, d_model], or with a state for the [S, T, d_model] that follow.

        The residual stream comes, and goes, as two terms that are still to be added: so that who
        reads it next can do that in the pass over memory that it takes anyway.

        Args:
            x: the residual stream without ``added``.
            run: what the layers share.
            state: of this layer, after the tokens before.
            added: what the layer before adds to ``x``.

        Returns:
            the new residual stream but for what the MLP adds to it; that; the inner loss of the
            memory, if there is one; the state, if ``run`` keeps it.
        """
        skipped = 0 if state is not None else self.n_persistent
        cache = None if state is None else state.cache
        past = None if state is None else state.memory
        retrieved, memory, loss = None, None, None

        if self.variant == "MAL":
            x, normed = self.norm_memory.after_adding(x, *(added or (None,)))
            said = self.memory(normed, past, run.position, skipped)
            memory, loss = said.state, said.loss
            added = Addend(self.dropout(said.behind(skipped)))
        x, normed = self.norm_attention.after_adding(x, *(added or (None,)))
        if self.variant in ("MAC", "MAG"):
            said = self.memory(normed, past, run.position, skipped)
            memory, loss = said.state, said.loss
            if self.variant == "MAC":
                retrieved = self.norm_memory(said.retrieved)
        attended, bias, cache = self.attention(normed, run, retrieved, cache)
        if self.variant in ("MAC", "MAG"):
            attended = said.behind(skipped, attended)
        x, normed = self.norm_mlp.after_adding(x, *self._dropped(attended, bias))
        added = self._dropped(*self.mlp.apart(normed))
        if not run.keep_state:
            return x, added, loss, None
        assert cache is not None
        return x, added, loss, LayerState(cache, memory)

    def _dropped(self, value: Tensor, bias: Tensor | None) -> Addend:
        if bias is None or not self.training or self.dropout.p == 0:
            return Addend(self.dropout(value), bias)
        return Addend(self.dropout(value + bias))
