"""Tasks made of short problems, each a question and an answer of its own.

Legend: n problems, P tokens of a problem, padding included.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from titanmac_integration._data._tasks import Batch
from titanmac_integration._labels import IGNORE_INDEX

from ._score import EvalRows, RetentionTask

QUESTION_WEIGHT = 0.1
END = ord("\n")


class ProblemTask(RetentionTask):
    """Problems in random order, as many in a row as fit; the measure is exact match of answers.

    Questions count in the training loss with weight 0.1 (every tenth of their tokens, drawn at
    random, has a label), so that the model also learns to write problems itself; in the scores
    only answers count.

    Args:
        name: of the task.
        train, validation, test: (tokens, is_answer) each, int64 and bool [n, P].
        chance: share of answers that guessing gets right.
        max_eval: at most this many held-out problems per set are evaluated.
        seq_len: tokens of an evaluated row; problems are packed like in training.
    """

    metric = "exact_match"
    higher_is_better = True
    perfect = 1.0

    def __init__(
        self,
        name: str,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        chance: float,
        max_eval: int = 2000,
        seq_len: int = 64,
    ) -> None:
        self.name = name
        self.chance = chance
        self._tokens, self._is_answer = train
        self.problem_length = self._tokens.shape[1]
        """Tokens of a problem."""
        self.train_tokens_total = self._tokens.numel()
        self._rows = {
            "validation": self._pack(validation, max_eval, seq_len),
            "test": self._pack(test, max_eval, seq_len),
        }

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """``batch_size`` rows of as many problems as fit into ``seq_len`` tokens.

        Raises:
            ValueError: not even one problem fits.
        """
        per_row = self._per_row(seq_len)
        chosen = torch.randint(len(self._tokens), (batch_size, per_row), generator=generator)
        tokens = self._tokens[chosen].flatten(1)
        drawn = torch.rand(tokens.shape, generator=generator) < QUESTION_WEIGHT
        counts = self._is_answer[chosen].flatten(1) | drawn
        return Batch(tokens, tokens.masked_fill(~counts, IGNORE_INDEX))

    def rows(self, split: str) -> EvalRows:
        return self._rows[split]

    def _per_row(self, seq_len: int) -> int:
        if seq_len < self.problem_length:
            raise ValueError(
                f"seq_len (={seq_len}) must be at least {self.problem_length}, the tokens of one "
                f"problem of task {self.name}."
            )
        return seq_len // self.problem_length

    def _pack(self, problems: tuple[Tensor, Tensor], max_eval: int, seq_len: int) -> EvalRows:
        tokens, is_answer = (part[:max_eval] for part in problems)
        per_row = max(1, min(seq_len // self.problem_length, len(tokens)))
        n = len(tokens) // per_row * per_row
        tokens, is_answer = tokens[:n], is_answer[:n]
        numbers = torch.arange(n)[:, None].expand_as(tokens)
        return EvalRows(
            tokens.reshape(n // per_row, -1),
            tokens.masked_fill(~is_answer, IGNORE_INDEX).reshape(n // per_row, -1),
            numbers.masked_fill(~is_answer, -1).reshape(n // per_row, -1),
        )


def additions(
    name: str = "arithmetic",
    *,
    n_digits: int = 2,
    symbols: str = "0123456789+=\n",
    held_out: float = 0.2,
    seed: int = 0,
    seq_len: int = 64,
) -> ProblemTask:
    """Sums, numbers least significant digit first: 57 + 68 = 125 is ``75+86=521\\n``.

    Pairs are split, commuted twins together, into training, validation and test.

    Args:
        name: of the task.
        n_digits: digits per operand.
        symbols: how the ten digits, plus, equals and line end are written; letters make a task
            that shares its symbols with prose.
        held_out: share of the pairs that training never sees, half of it for each held-out set.
        seed: of the split.
        seq_len: tokens of an evaluated row.
    """
    if len(symbols) != 13 or len(set(symbols)) != 13:
        raise ValueError(
            f"symbols (={symbols!r}) must be 13 different characters: ten digits, plus, equals, "
            "line end."
        )
    numbers = 10**n_digits
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(numbers), with_replacement=True)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    half = max(1, round(held_out * len(pairs) / 2))
    parts = (pairs[2 * half :], pairs[:half], pairs[half : 2 * half])

    def write(part: Tensor) -> tuple[Tensor, Tensor]:
        part = torch.cat((part, part[part[:, 0] != part[:, 1]].flip(1)))
        part = part[torch.randperm(len(part), generator=generator)]
        left, right = part.unbind(1)
        sign = torch.full((len(part), 1), 10)
        columns = (
            _digits(left, n_digits),
            sign,
            _digits(right, n_digits),
            sign + 1,
            _digits(left + right, n_digits + 1),
            sign + 2,
        )
        return _as_symbols(torch.cat(columns, 1), symbols, 2 * n_digits + 2)

    train, validation, test = map(write, parts)
    # guessing the most frequent sum, numbers - 1, is right for `numbers` of numbers^2 pairs
    return ProblemTask(name, train, validation, test, chance=1 / numbers, seq_len=seq_len)


def reversals(*, n_digits: int = 4, seed: int = 0, seq_len: int = 64) -> ProblemTask:
    """Digits backwards, ``1234+=4321\\n``: exactly the symbols of the sums, another function."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(10**n_digits, generator=generator)
    sign = torch.full((len(numbers), 1), 10)
    digits = _digits(numbers, n_digits)
    columns = torch.cat((digits, sign, sign + 1, digits.flip(1), sign + 2), 1)
    tokens, is_answer = _as_symbols(columns, "0123456789+=\n", n_digits + 2)
    tenth = max(1, len(tokens) // 10)
    cuts = (slice(2 * tenth, None), slice(0, tenth), slice(tenth, 2 * tenth))
    train, validation, test = ((tokens[cut], is_answer[cut]) for cut in cuts)
    chance = 10.0**-n_digits
    return ProblemTask("reversal", train, validation, test, chance=chance, seq_len=seq_len)


def question_answers(
    path: str | os.PathLike[str], *, name: str | None = None, seed: int = 0, seq_len: int = 64
) -> ProblemTask:
    """Problems of a JSON-lines file: objects with the strings "question" and "answer".

    A problem is written as question, answer, line end, in UTF-8 bytes, padded with line ends to
    the longest of the file. A tenth of the lines each is for validation and test; lines of one
    question stay together. Chance is the share of the most frequent training answer.

    Raises:
        ValueError: the file is not in UTF-8, a line is no such object, there are fewer than 10
            different questions, or all have one answer.
    """
    pairs = []
    # not splitlines: a string may hold other separators of lines as they are
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} must be a JSON object: {error}.") from error
        if not isinstance(item, dict) or not {"question", "answer"} <= item.keys():
            raise ValueError(
                f'{path}, line {number} must be a JSON object with "question" and "answer".'
            )
        for key in ("question", "answer"):
            if not isinstance(item[key], str):
                shown = json.dumps(item[key], ensure_ascii=False)[:40]
                raise ValueError(
                    f'{path}, line {number}: {key} (={shown}) must be a string, in "".'
                )
        pairs.append((item["question"], item["answer"]))
    return from_pairs(name or Path(path).stem, pairs, seed=seed, seq_len=seq_len)


def from_pairs(
    name: str, pairs: Sequence[tuple[str, str]], *, seed: int = 0, seq_len: int = 64
) -> ProblemTask:
    """A task of question and answer strings; see :func:`question_answers`."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    by_question: dict[str, list[str]] = {}
    for question, answer in (pairs[i] for i in order):
        by_question.setdefault(question, []).append(answer)
    if len(by_question) < 10:
        raise ValueError(
            f"task {name} ({len(by_question)} different questions) must have at least 10: some "
            "are kept for validation and test."
        )
    written = [
        (question.encode(), (answer + "\n").encode())
        for question, answers in by_question.items()
        for answer in answers
    ]
    length = max(len(q) + len(a) for q, a in written)
    tokens = torch.full((len(written), length), END)
    is_answer = torch.zeros(len(written), length, dtype=torch.bool)
    for row, (question, answer) in enumerate(written):
        end = len(question) + len(answer)
        tokens[row, :end] = torch.tensor(list(question + answer))
        is_answer[row, len(question) : end] = True
    # a question that is held out must not be one that was trained on
    ends = list(accumulate(map(len, by_question.values())))
    tenth = max(1, len(written) // 10)
    first = next(end for end in ends if end >= tenth)
    second = next((end for end in ends if end >= first + tenth), ends[-1])
    if second == ends[-1]:
        raise ValueError(
            f"task {name} ({len(written)} problems) must not repeat a question so often that none "
            "is left to train on."
        )
    cuts = (slice(second, None), slice(0, first), slice(first, second))
    train, validation, test = ((tokens[cut], is_answer[cut]) for cut in cuts)
    answer, common = Counter(answer for _, answer in written[second:]).most_common(1)[0]
    chance = common / len(written[second:])
    if chance == 1:
        raise ValueError(
            f"task {name} (with {answer.decode()[:40]!r} for every question it is trained on) must "
            "have different answers: of one alone nothing can be learned or forgotten."
        )
    return ProblemTask(name, train, validation, test, chance=chance, seq_len=seq_len)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, without a mark of the byte order that some programs put before it.

    Raises:
        ValueError: it is not in UTF-8.
        OSError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, but is not at byte {error.start}.") from error


def _digits(numbers: Tensor, width: int) -> Tensor:
    """Digits, least significant first: int64 [n] -> int64 [n, width]."""
    return numbers[:, None] // 10 ** torch.arange(width) % 10


def _as_symbols(codes: Tensor, symbols: str, question: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 12 as bytes, and which of them are the answer."""
    tokens = torch.tensor([ord(symbol) for symbol in symbols])[codes]
    is_answer = (torch.arange(codes.shape[1]) >= question).expand_as(tokens)
    return tokens, is_answer
