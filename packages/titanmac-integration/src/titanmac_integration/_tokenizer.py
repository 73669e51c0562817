"""The byte-level tokenizer: a token is a byte."""

from collections.abc import Iterable


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255. No merges, no special tokens, nothing to download."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: a token outside 0 to 255.
        """
        values = [int(token) for token in tokens]
        for value in values:
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"tokens (contains {value}) must be in [0, 256).")
        return bytes(values).decode("utf-8", errors="replace")
