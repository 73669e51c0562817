"""Tokenizers: text to tokens and back."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

BYTES = "bytes"
_CHUNK = 1 << 20


class Tokenizer(Protocol):
    """What the data and the commands need of a tokenizer."""

    vocab_size: int
    """Tokens are in [0, vocab_size)."""
    end_of_text: int | None
    """The token behind a document or an answer; None if there is none."""

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``."""


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255. No merges, nothing to download; byte 0 ends a text."""

    vocab_size = 256
    end_of_text: int | None = 0

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


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of Hugging Face's `tokenizers` library. Needs the extra ``hf``.

    Args:
        path: the file.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the file cannot be read as a tokenizer.
    """

    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
    """The first of these that the vocabulary has ends a text."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise ImportError(
                f"tokenizer (={os.fspath(path)!r}) needs the tokenizers library: "
                "pip install 'titanmac-integration[hf]'."
            ) from error
        try:
            self._tokenizer: Any = Loaded.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"tokenizer (={os.fspath(path)!r}) must be a tokenizer.json of Hugging Face's "
                f"tokenizers: {error}."
            ) from error
        self._path = os.fspath(path)
        # not their number: some files leave tokens out
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        known = map(self._tokenizer.token_to_id, self.END_OF_TEXT)
        self.end_of_text: int | None = next((token for token in known if token is not None), None)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special ones. Long texts are cut at line ends on the way.

        Raises:
            ValueError: the text holds something that it has no token for.
        """
        try:
            encodings = self._tokenizer.encode_batch(_chunks(text), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"tokenizer (={self._path!r}) must have tokens for all of the text: {error}. Give "
                "it a token for what it does not know, or use bytes."
            ) from error
        return [token for encoding in encodings for token in encoding.ids]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``."""
        return str(self._tokenizer.decode([int(token) for token in tokens]))


def make_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """``"bytes"``, or the path of a ``tokenizer.json``.

    Raises:
        ValueError: neither.
    """
    if name == BYTES:
        return ByteTokenizer()
    if not Path(name).is_file():
        raise ValueError(
            f'tokenizer (={os.fspath(name)!r}) must be "bytes" or the path of a tokenizer.json.'
        )
    return HuggingFaceTokenizer(name)


def token_tensor(tokenizer: Tokenizer, text: str) -> Tensor:
    """Tokens of ``text``, [tokens], uint8 for bytes and int32 otherwise."""
    if isinstance(tokenizer, ByteTokenizer):
        data = bytearray(text.encode("utf-8"))
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
    return torch.tensor(tokenizer.encode(text), dtype=torch.int32)


def _chunks(text: str) -> list[str]:
    """``text`` in pieces of about a million characters that end where a line ends."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK) + 1
        end = end if end > 0 else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
