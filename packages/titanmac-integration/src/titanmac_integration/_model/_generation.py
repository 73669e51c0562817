"""Writing text: one token at a time, with the state carried along."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titanmac_integration._inputs import check_prompt

if TYPE_CHECKING:
    from ._titanmac import TitanMAC


@torch.no_grad()
def generate(
    model: TitanMAC,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """See :meth:`TitanMAC.generate`."""
    check_prompt(model.config, prompt, max_new_tokens, temperature, top_k)
    training = model.training
    model.eval()
    try:
        tokens, written, state = prompt, [prompt], None
        for _ in range(max_new_tokens):
            hidden, _, state = model.hidden(tokens, state, keep_state=True)
            logits = model.logits(hidden[:, -1])
            tokens = pick_token(logits, temperature, top_k, generator)[:, None].to(prompt.dtype)
            written.append(tokens)
        return torch.cat(written, dim=1)
    finally:
        model.train(training)


def pick_token(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token [S] per row of ``logits`` [S, V]; temperature 0 takes the most probable."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
