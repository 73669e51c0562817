"""Next-token prediction on running text."""

import hashlib
import math

import torch
from torch import Tensor, nn

from titanmac_integration._metrics import bits_per_byte

from ._tasks import Batch, Task

EVAL_BATCH = 64
EVAL_LOGITS = 1 << 25
"""At most this many logits are computed at a time."""


class TextTask(Task):
    """Windows of a text at random places; measured on another text that training never sees.

    Args:
        train_tokens: integer [tokens].
        validation_tokens: integer [tokens].
        name: name of the task.
        vocab_size: tokens are below this.
        tokens_per_byte: of the validation text: 1 for bytes as tokens.
        eval_windows: validation windows, evenly spaced.
        eval_length: tokens predicted per window.

    Raises:
        ValueError: a size below 1, or a validation text shorter than a window.
    """

    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(
        self,
        train_tokens: Tensor,
        validation_tokens: Tensor,
        *,
        name: str = "text",
        vocab_size: int = 256,
        tokens_per_byte: float = 1.0,
        eval_windows: int = 128,
        eval_length: int = 64,
    ) -> None:
        for argument, value in (("eval_windows", eval_windows), ("eval_length", eval_length)):
            if value < 1:
                raise ValueError(f"{argument} (={value}) must be at least 1.")
        self.name, self.min_vocab_size = name, vocab_size
        self.chance = math.log2(vocab_size) * tokens_per_byte
        self.tokens_per_byte = tokens_per_byte
        self.train_tokens, self.validation_tokens = train_tokens, validation_tokens
        unit = "bytes" if tokens_per_byte == 1.0 else "tokens"
        if len(validation_tokens) < eval_length + 1:
            total = len(train_tokens) + len(validation_tokens)
            raise ValueError(
                f"text ({total} {unit}) must leave at least eval_length + 1 "
                f"(={eval_length + 1}) {unit} for validation; give more text, hold out more of "
                "it, or use a shorter window."
            )
        last = len(validation_tokens) - eval_length - 1
        starts = torch.linspace(0, last, min(eval_windows, last + 1)).long()
        self._validation = windows(validation_tokens, starts, eval_length + 1)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Name, and a digest of the training text."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(self.train_tokens.numpy().data, digest_size=8).hexdigest()
            self._fingerprint = f"{self.name}/{digest}"
        return self._fingerprint

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Random windows of the training text; every token but the first counts."""
        limit = len(self.train_tokens) - seq_len + 1
        if limit < 1:
            raise ValueError(
                f"seq_len (={seq_len}) must be at most {len(self.train_tokens)}, the length of the "
                "training text in tokens."
            )
        starts = torch.randint(limit, (batch_size,), generator=generator)
        chosen = windows(self.train_tokens, starts, seq_len)
        return Batch(chosen, chosen)

    def measure(self, model: nn.Module, device: torch.device) -> float:
        """Bits per byte over the validation windows."""
        vocab_size = getattr(getattr(model, "config", None), "vocab_size", self.min_vocab_size)
        rows = max(1, min(EVAL_BATCH, EVAL_LOGITS // (self._validation.shape[1] * vocab_size)))
        total = 0.0
        for chosen in self._validation.split(rows):
            chosen = chosen.to(device)
            logits = model(chosen[:, :-1])["logits"]
            total += bits_per_byte(logits, chosen[:, 1:]) * len(chosen)
        return total / len(self._validation) * self.tokens_per_byte


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """int64 [windows, length]."""
    return tokens[starts[:, None] + torch.arange(length)].long()


def check_held_out(held_out: float) -> None:
    """Raise ``ValueError`` unless a part, and not all, is held out."""
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out (={held_out}) must be between 0 and 1; try 0.1.")
