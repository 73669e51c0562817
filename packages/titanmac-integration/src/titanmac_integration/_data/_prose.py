"""English prose that every Python installation has: the help texts of the language reference."""

from ._text import TextTask, check_held_out
from ._tokenizer import ByteTokenizer, token_tensor

CHANCE_BITS = 8.0


def load_prose() -> str:
    """The topics of ``help()`` joined in alphabetical order, about 400,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class ProseTask(TextTask):
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

    def __init__(
        self,
        text: str | None = None,
        *,
        held_out: float = 0.1,
        eval_windows: int = 128,
        eval_length: int = 64,
    ) -> None:
        check_held_out(held_out)
        tokens = token_tensor(ByteTokenizer(), load_prose() if text is None else text)
        cut = len(tokens) - int(held_out * len(tokens))
        super().__init__(
            tokens[:cut],
            tokens[cut:],
            name=self.name,
            eval_windows=eval_windows,
            eval_length=eval_length,
        )
