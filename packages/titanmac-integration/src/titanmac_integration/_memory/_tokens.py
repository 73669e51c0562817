"""From projections to tokens and gates: a short causal convolution, SiLU, normalisation.

Legend: S batch, T tokens, H heads, D width; C = 3 H D channels (query, key, value), W features of
a projection: C channels, 3 H logits of gates, and perhaps some more that nobody reads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._gates import Gates
from ._kernels import gradients_again, on_gpu

TAPS = 4
"""Tokens that the short convolution sees: a token and the three before it."""


def tokens_and_gates(
    flat: Tensor,
    past: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    heads: int,
    width: int,
    max_step: float,
    skipped: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries, keys, values [S, T, 3, H, D] and gates [3, S, H, T], in float32 at least.

    Args:
        flat: projections [S, skipped + T, W].
        past: channels of the tokens before [S, TAPS - 1, C]; None for zeros.
        taps: weights of the convolution [C, TAPS], the token's own last.
        bias: [3 H] to add to the logits, or None.
        heads: H.
        width: D.
        max_step: see `Gates`.
        skipped: rows of ``flat`` in front that are no tokens.
    """
    if not on_gpu(flat):
        return _plain(flat, past, taps, bias, heads, width, max_step, skipped)
    sizes = heads, width, max_step, skipped
    made: tuple[Tensor, Tensor] = _Tokens.apply(flat, past, taps, bias, *sizes)
    return made


def _plain(
    flat: Tensor,
    past: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    heads: int,
    width: int,
    max_step: float,
    skipped: int,
) -> tuple[Tensor, Tensor]:
    flat = flat[:, skipped:]
    channels, logits = flat[..., : len(taps)], flat[..., len(taps) :][..., : 3 * heads]
    before = (0, 0, TAPS - 1, 0)
    if past is None:
        channels = functional.pad(channels, before)
    else:
        channels = torch.cat((past.to(flat.dtype), channels), dim=1)
    # written out: a library's convolution may mix positions in rounding, and so the future in
    taps = taps.to(flat.dtype)
    tokens = flat.shape[1]
    mixed = channels[:, TAPS - 1 :] * taps[:, -1]
    for i in range(TAPS - 1):
        mixed = torch.addcmul(mixed, channels[:, i : i + tokens], taps[:, i])
    heads_apart = at_least_single(functional.silu(mixed)).unflatten(-1, (3, heads, width))
    both, value = heads_apart.split((2, 1), dim=2)
    logits = at_least_single(logits)
    logits = logits if bias is None else logits + bias
    gates = Gates.from_logits(logits.unflatten(-1, (3, heads)).permute(2, 0, 3, 1), max_step)
    return torch.cat((functional.normalize(both, dim=-1), value), dim=2), torch.stack(gates)


class _Tokens(torch.autograd.Function):
    """`_plain` by kernels, which compute in float32 throughout."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        past: Tensor | None,
        taps: Tensor,
        bias: Tensor | None,
        heads: int,
        width: int,
        max_step: float,
        skipped: int,
    ) -> tuple[Tensor, Tensor]:
        from . import _token_kernels as kernels

        ctx.save_for_backward(flat, past, taps, bias)
        ctx.sizes = heads, width, max_step, skipped
        past = None if past is None else past.contiguous()
        made: tuple[Tensor, Tensor] = kernels.tokens_and_gates(
            flat.contiguous(), past, taps, bias, *ctx.sizes
        )
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again
        flat, past, taps, bias = saved
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():

            def plain(
                flat: Tensor, past: Tensor | None, taps: Tensor, bias: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                return _plain(flat, past, taps, bias, *ctx.sizes)

            found = gradients_again(plain, saved, grads)
        else:
            from . import _token_kernels as kernels

            past = None if past is None else past.contiguous()
            d_tokens, d_gates = (grad.contiguous() for grad in grads)
            found = kernels.tokens_and_gates_backward(
                flat.contiguous(), past, taps, bias, d_tokens, d_gates, *ctx.sizes[2:]
            )
        return *found, None, None, None, None


def at_least_single(x: Tensor) -> Tensor:
    """Half precision is not enough to add up thousands of small steps."""
    return x if x.dtype == torch.float64 else x.float()
