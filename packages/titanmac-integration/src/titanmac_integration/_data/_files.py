"""Training data from the user's files: text, and JSON lines of texts or of questions."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._records import QuestionTask
from ._tasks import Task
from ._text import TextTask, check_held_out
from ._tokenizer import ByteTokenizer, Tokenizer, token_tensor

JSON_LINES = (".jsonl", ".ndjson")
MAPPED_ABOVE = 1 << 28
"""Text files of more bytes are mapped, not read."""


class _Part(NamedTuple):
    """One file's text, split."""

    train: Tensor
    held_out: Tensor
    held_out_bytes: int


def load_data(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer | None = None,
    *,
    held_out: float = 0.1,
    eval_length: int = 64,
) -> list[Task]:
    """Tasks made of files: one of all texts, one of all questions.

    A file that ends in ``.jsonl`` has a JSON object per line, either with a ``text`` or with a
    ``question`` and an ``answer``; any other file is text. The end of every file is held out for
    evaluation: the split is by position.

    Args:
        paths: the files.
        tokenizer: default: bytes.
        held_out: share of each file's bytes, or records, that is kept for evaluation.
        eval_length: tokens predicted per window of held-out text; fewer where there is less text.

    Raises:
        ValueError: a file is empty or not as described; the message names file and line.
        OSError: a file cannot be read.
    """
    check_held_out(held_out)
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    if not paths:
        raise ValueError("paths (=[]) must name at least one file.")
    parts: list[_Part] = []
    train: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} must be a file, but is a directory; name the files in it, for example "
                f"{path / '*.txt'}."
            )
        if path.exists() and not path.is_file():
            raise ValueError(
                f"{path} must be a file, but is a pipe or a device, which cannot be read again "
                "when the run is continued; write the data to a file."
            )
        if path.suffix.lower() not in JSON_LINES:
            parts.append(_text_file(path, tokenizer, held_out))
            continue
        texts, questions = _json_lines(path)
        if texts:
            cut = _cut(path, len(texts), held_out, "records")
            parts.append(_documents(texts[:cut], texts[cut:], tokenizer))
        if questions:
            cut = _cut(path, len(questions), held_out, "records")
            train += questions[:cut]
            kept += questions[cut:]
    tasks: list[Task] = [_text_task(parts, tokenizer, eval_length)] if parts else []
    return [*tasks, QuestionTask(train, kept, tokenizer)] if train else tasks


def _text_task(parts: list[_Part], tokenizer: Tokenizer, eval_length: int) -> TextTask:
    first = parts[0]
    # one file stays where the system has mapped it
    train = first.train if len(parts) == 1 else torch.cat([part.train for part in parts])
    held_out = torch.cat([part.held_out for part in parts])
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    ratio = len(held_out) / max(1, sum(part.held_out_bytes for part in parts))
    return TextTask(
        train,
        held_out,
        vocab_size=tokenizer.vocab_size,
        tokens_per_byte=1.0 if is_bytes else ratio,
        eval_length=max(1, min(eval_length, len(held_out) - 1)),
    )


def _text_file(path: Path, tokenizer: Tokenizer, held_out: float) -> _Part:
    size = path.stat().st_size
    cut = _cut(path, size, held_out, "bytes")
    if isinstance(tokenizer, ByteTokenizer):
        # mapped: several processes share it, and it may be larger than memory
        tokens = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        if size <= MAPPED_ABOVE:
            # a mapped file that an editor shortens kills the process without a word
            tokens = tokens.clone()
        return _Part(tokens[:cut], tokens[cut:], size - cut)
    data = path.read_bytes()
    while cut < size and data[cut] & 0xC0 == 0x80:  # not within a character
        cut += 1
    train, held = _decoded(path, data[:cut], 0), _decoded(path, data[cut:], cut)
    return _Part(token_tensor(tokenizer, train), token_tensor(tokenizer, held), size - cut)


def _decoded(path: Path, data: bytes, start: int) -> str:
    """The part of a file that begins at byte ``start``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text for this tokenizer, but is not at byte "
            f"{start + error.start}; use the tokenizer of bytes, or convert the file."
        ) from error


def _documents(train: list[str], held_out: list[str], tokenizer: Tokenizer) -> _Part:
    """Documents one after another, each with the end of text behind it."""

    def tokens(texts: list[str]) -> Tensor:
        end = tokenizer.encode("\n") if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        behind = torch.tensor(end)
        pieces = [token_tensor(tokenizer, text) for text in texts]
        return torch.cat([part for p in pieces for part in (p, behind.to(p.dtype))])

    held_out_bytes = sum(len(text.encode()) + 1 for text in held_out)
    return _Part(tokens(train), tokens(held_out), held_out_bytes)


def _json_lines(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    texts: list[str] = []
    questions: list[tuple[str, str]] = []
    for place, record in _records(path):
        text, question, answer = map(record.get, ("text", "question", "answer"))
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(question, str) and isinstance(answer, str):
            questions.append((question, answer))
        else:
            raise ValueError(
                f'{place} (keys {sorted(record)}) must have a string "text", or strings '
                '"question" and "answer".'
            )
    if not any(texts) and not questions:
        what = "only empty texts" if texts else "no record"
        raise ValueError(f"{path} holds {what}; data must not be empty.")
    return texts, questions


def _records(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise ValueError(f"{place} must be a JSON object: {error}.") from error
            if not isinstance(record, dict):
                raise ValueError(f"{place} (={str(record)[:40]!r}) must be a JSON object.")
            _check_characters(place, record)
            yield place, record


def _check_characters(place: str, record: dict[str, object]) -> None:
    """JSON can write halves of a character, as ``\\ud83d``, that no text can hold."""
    for key, value in record.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ascii(value[error.start])
                raise ValueError(
                    f"{place} ({key!r} holds {half} alone, half of a character) must be text; "
                    "write both halves, or leave it out."
                ) from error


def _cut(path: Path, size: int, held_out: float, unit: str) -> int:
    """Where the held-out part begins; both parts have something."""
    if size < 2:
        raise ValueError(
            f"{path} ({size} {unit}) must have at least 2 {unit}: some to train on, some to hold "
            "out."
        )
    return min(size - 1, max(1, size - int(held_out * size)))
