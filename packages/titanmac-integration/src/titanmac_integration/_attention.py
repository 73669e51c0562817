"""Causal sliding-window attention with rotary positions and persistent tokens.

Legend: S batch, P persistent tokens, T tokens of the sequence, L = P + T, H heads, D head width.
The P persistent tokens come first, so position i of the sequence is row P + i.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._config import TitanMACConfig
from ._linear import make_linear


def attention_mask(
    n_tokens: int, *, window_size: int, n_persistent: int, device: torch.device | None = None
) -> Tensor | None:
    """Who may attend to whom: bool [L, L], True where the row may see the column.

    A token sees all persistent tokens, itself and the ``window_size - 1`` tokens before it.
    A persistent token sees persistent tokens only: if it saw the sequence, every token would see
    the future through it. None stands for plain causal attention.
    """
    if n_persistent == 0 and window_size >= n_tokens:
        return None
    position = torch.arange(n_persistent + n_tokens, device=device)
    distance = position[:, None] - position[None, :]
    in_window = (distance >= 0) & (distance < window_size)
    persistent = position < n_persistent
    return torch.where(persistent[:, None], persistent[None, :], in_window | persistent[None, :])


def rotary_table(
    length: int, head_width: int, base: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, float32 [length, head_width / 2] each.

    Su et al. 2021, "RoFormer", section 3.2.
    """
    pairs = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
    frequency = base ** (-pairs / head_width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of ``x`` [S, H, L, D] by the angles of its positions [L, D / 2]."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class CausalWindowAttention(nn.Module):
    """Multi-head attention over a causal window; ``mask`` and rotary table come from the model."""

    def __init__(
        self, config: TitanMACConfig, layer: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        width = config.d_model
        self.qkv = make_linear(config, layer, "attention", width, 3 * width, generator=generator)
        self.out = make_linear(config, layer, "attention", width, width, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """``x`` [S, L, d_model] -> [S, L, d_model]; ``mask`` bool [L, L] or None for causal."""
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.n_heads, width // self.n_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, *rotary),
            rotate(key, *rotary),
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return output
