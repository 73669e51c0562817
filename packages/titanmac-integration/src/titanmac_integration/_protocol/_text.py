"""Next-byte prediction on a text."""

import math

import torch

from titanmac_integration._data._prose import load_prose
from titanmac_integration._data._tasks import Batch

from ._score import EvalRows, RetentionTask


class TextTask(RetentionTask):
    """A text, split by position: training, then validation, then test.

    Args:
        name: of the task.
        text: the text; its UTF-8 bytes are the tokens.
        held_out: share of the text, at its end, that is kept; half of it for each held-out set.
        eval_windows: windows per held-out set, evenly spaced.
        eval_length: bytes predicted per window.

    Raises:
        ValueError: the text is too short for that.
    """

    metric = "bits_per_byte"
    higher_is_better = False
    chance = 8.0
    perfect = 0.0

    def __init__(
        self,
        name: str,
        text: str,
        *,
        held_out: float = 0.1,
        eval_windows: int = 1024,
        eval_length: int = 63,
    ) -> None:
        self.name = name
        data = bytearray(text.encode("utf-8"))
        half = int(held_out * len(data) / 2)
        if half < eval_length + 1:
            least = math.ceil(2 * (eval_length + 1) / held_out)
            raise ValueError(
                f"text of task {name} ({len(data)} bytes) must have at least {least} bytes: each "
                f"held-out set is {held_out / 2:.0%} of it, and one window is {eval_length + 1}."
            )
        tokens = torch.frombuffer(data, dtype=torch.uint8).long()
        self._train = tokens[: len(tokens) - 2 * half]
        self.train_tokens_total = len(self._train)
        held = {"validation": tokens[-2 * half : -half], "test": tokens[-half:]}
        self._rows = {
            split: _eval_rows(part, eval_windows, eval_length) for split, part in held.items()
        }

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Random windows of the training text; every byte but the first counts.

        Raises:
            ValueError: the training text is shorter than ``seq_len``.
        """
        limit = len(self._train) - seq_len + 1
        if limit < 1:
            raise ValueError(
                f"seq_len (={seq_len}) must be at most {len(self._train)}, the bytes of the "
                f"training text of task {self.name}."
            )
        starts = torch.randint(limit, (batch_size,), generator=generator)
        windows = self._train[starts[:, None] + torch.arange(seq_len)]
        return Batch(windows, windows)

    def rows(self, split: str) -> EvalRows:
        return self._rows[split]


def prose() -> TextTask:
    """The text of Python's language reference, which every installation of Python has."""
    return TextTask("prose", load_prose())


def _eval_rows(tokens: torch.Tensor, windows: int, length: int) -> EvalRows:
    last = len(tokens) - length - 1
    starts = torch.linspace(0, last, min(windows, last + 1)).long()
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    return EvalRows(rows, rows, torch.zeros_like(rows))
