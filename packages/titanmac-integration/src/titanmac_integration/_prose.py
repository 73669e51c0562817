"""English prose that every Python installation has: the help texts of the language reference."""

import torch
from torch import Tensor, nn

from ._metrics import bits_per_byte
from ._tasks import Batch, Task
from ._tokenizer import ByteTokenizer

CHANCE_BITS = 8.0
EVAL_BATCH = 64


def load_prose() -> str:
    """The topics of ``help()`` joined in alphabetical order, about 400,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class ProseTask(Task):
    """Next-byte prediction on the text of Python's language reference (``pydoc_data.topics``).

    The last ``held_out`` of the text is for validation: the split is by position, so that no
    validation window overlaps a training window. The text differs a little between versions of
    Python, and with it the figures.

    Args:
        text: another text to learn instead.
        held_out: share of the text, at its end, that is kept for evaluation.
        eval_windows: validation windows, evenly spaced.
        eval_length: bytes predicted per window.
    """

    name = "prose"
    metric = "bits_per_byte"
    higher_is_better = False
    chance = CHANCE_BITS

    def __init__(
        self,
        text: str | None = None,
        *,
        held_out: float = 0.1,
        eval_windows: int = 128,
        eval_length: int = 64,
    ) -> None:
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out (={held_out}) must be between 0 and 1; try 0.1.")
        for name, value in (("eval_windows", eval_windows), ("eval_length", eval_length)):
            if value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1.")
        tokens = torch.tensor(ByteTokenizer().encode(load_prose() if text is None else text))
        cut = len(tokens) - int(held_out * len(tokens))
        self.train_tokens, self.validation_tokens = tokens[:cut], tokens[cut:]
        if len(self.validation_tokens) < eval_length + 1:
            raise ValueError(
                f"text ({len(tokens)} bytes) must leave at least eval_length + 1 "
                f"(={eval_length + 1}) bytes for validation; give more text or a shorter window."
            )
        last = len(self.validation_tokens) - eval_length - 1
        starts = torch.linspace(0, last, min(eval_windows, last + 1)).long()
        self._validation = _windows(self.validation_tokens, starts, eval_length + 1)

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Random windows of the training text; every byte but the first counts."""
        limit = len(self.train_tokens) - seq_len + 1
        if limit < 1:
            raise ValueError(
                f"seq_len (={seq_len}) must be at most {len(self.train_tokens)}, the bytes of the "
                "training text."
            )
        starts = torch.randint(limit, (batch_size,), generator=generator)
        windows = _windows(self.train_tokens, starts, seq_len)
        return Batch(windows, windows)

    def measure(self, model: nn.Module, device: torch.device) -> float:
        """Bits per byte over the validation windows."""
        total = 0.0
        for windows in self._validation.split(EVAL_BATCH):
            windows = windows.to(device)
            logits = model(windows[:, :-1])["logits"]
            total += bits_per_byte(logits, windows[:, 1:]) * len(windows)
        return total / len(self._validation)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """int64 [windows, length]."""
    return tokens[starts[:, None] + torch.arange(length)]
