"""What a model is given: the checks, and the messages when something is wrong."""

import torch
from torch import Tensor

from titanmac_integration._config._config import TitanMACConfig

from ._state import ModelState


def check_inputs(
    config: TitanMACConfig, input_ids: Tensor, labels: Tensor | None, state: ModelState | None
) -> None:
    """Shapes, types, length and, on the CPU only, where it is free, the vocabulary."""
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids (shape {tuple(input_ids.shape)}, {input_ids.dtype}) must be an int64 "
            "or int32 tensor [batch, sequence]; use input_ids.long(), for one sequence "
            "input_ids[None]."
        )
    batch, length = input_ids.shape
    if length == 0:
        raise ValueError("input_ids (sequence of 0 tokens) must hold at least one token.")
    _check_length(config, length, 0 if state is None else state.position)
    if state is not None:
        known = state.layers[0].cache.near[0].shape[0]
        if len(state.layers) != config.n_layers or known != batch:
            raise ValueError(
                f"state (of {known} sequences, {len(state.layers)} layers) must fit input_ids "
                f"({batch} sequences) and the model ({config.n_layers} layers)."
            )
    if labels is not None and (labels.shape != input_ids.shape or labels.dtype != torch.int64):
        raise ValueError(
            f"labels (shape {tuple(labels.shape)}, {labels.dtype}) must be int64 with the "
            f"shape of input_ids {tuple(input_ids.shape)}; the shift happens inside."
        )
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, tokens, allowed in (("input_ids", input_ids, 0), ("labels", labels, -100)):
            if tokens is not None and tokens.numel():
                _check_vocabulary(config, name, tokens, allowed)


def check_prompt(
    config: TitanMACConfig,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
) -> None:
    """The arguments of ``generate``."""
    check_inputs(config, prompt, None, None)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise ValueError(f"max_new_tokens (={max_new_tokens!r}) must be an integer.")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens (={max_new_tokens}) must not be negative.")
    length = prompt.shape[1] + max_new_tokens
    if length > config.max_seq_len:
        raise ValueError(
            f"prompt ({prompt.shape[1]} tokens) and max_new_tokens (={max_new_tokens}) must not "
            f"exceed max_seq_len (={config.max_seq_len}) together; ask for at most "
            f"{config.max_seq_len - prompt.shape[1]}."
        )
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature (={temperature}) must be 0 (the most probable token) or more."
        )
    if top_k is not None and (isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k (={top_k}) must be at least 1; None allows every token.")


def _check_length(config: TitanMACConfig, length: int, position: int) -> None:
    if position + length > config.max_seq_len:
        before = f" after {position}" if position else ""
        raise ValueError(
            f"input_ids (sequence of {length} tokens{before}) must not be longer than "
            f"max_seq_len (={config.max_seq_len}); cut it or raise max_seq_len."
        )


def _check_vocabulary(config: TitanMACConfig, name: str, tokens: Tensor, ignored: int) -> None:
    outside = (tokens >= config.vocab_size) | ((tokens < 0) & (tokens != ignored))
    if bool(outside.any()):
        raise ValueError(
            f"{name} (contains {int(tokens[outside][0])}) must be in [0, vocab_size "
            f"(={config.vocab_size})); use the tokenizer that the model was made for."
        )
