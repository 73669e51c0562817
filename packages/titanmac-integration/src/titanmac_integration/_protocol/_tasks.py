"""The tasks of the protocol by name."""

import hashlib
from pathlib import Path

from ._digits import permuted_digits, split_digits
from ._problems import additions, question_answers, read_text, reversals
from ._score import RetentionTask
from ._text import TextTask, prose

LETTERS = "etaoinshrdlu\n"
"""Ten letters for the digits, "l" for plus, "u" for equals: English text is full of them."""

TASK_HELP = (
    '"arithmetic", "letters" (arithmetic written in letters that prose uses), "reversal" (digits '
    'backwards, in the symbols of arithmetic), "prose", "text:FILE" (a text file), "qa:FILE" (JSON '
    'lines with question and answer), "permuted-digits:SEED", "split-digits:LOW-HIGH" '
    "(scikit-learn's digits, with --seq-len 66)"
)


def make_retention_task(name: str, *, seq_len: int = 64) -> RetentionTask:
    """A task of the protocol.

    Args:
        name: one of the names in ``TASK_HELP``.
        seq_len: tokens of an evaluated row.

    Raises:
        ValueError: an unknown name, or a file that cannot be used.
        OSError: a file that cannot be read.
    """
    kind, _, argument = name.partition(":")
    if kind == "text" and argument:
        path = Path(argument)
        return TextTask(path.stem, read_text(path), eval_length=seq_len - 1)
    if kind == "qa" and argument:
        return question_answers(argument, seq_len=seq_len)
    if kind == "permuted-digits" and argument.isdecimal():
        return permuted_digits(int(argument))
    if kind == "split-digits" and argument:
        return split_digits(argument)
    if name == "arithmetic":
        return additions(seq_len=seq_len)
    if name == "letters":
        return additions("letters", symbols=LETTERS, seq_len=seq_len)
    if name == "reversal":
        return reversals(seq_len=seq_len)
    if name == "prose":
        return prose()
    raise ValueError(f"task (={name!r}) must be one of {TASK_HELP}.")


def file_digest(name: str) -> str:
    """Digest of the file that a task is read from; "" for a task without one.

    Raises:
        OSError: a file that cannot be read.
    """
    kind, _, argument = name.partition(":")
    if kind not in ("text", "qa") or not argument:
        return ""
    return hashlib.blake2b(Path(argument).read_bytes(), digest_size=8).hexdigest()
