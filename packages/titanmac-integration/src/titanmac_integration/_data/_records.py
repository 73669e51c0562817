"""Questions with answers as a task."""

import hashlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titanmac_integration._labels import IGNORE_INDEX

from ._tasks import Batch, Task
from ._tokenizer import Tokenizer

EVAL_BATCH = 64


class QuestionTask(Task):
    """Learns to answer: only the tokens of the answers, and the end behind them, count.

    A sequence is question, line end, answer, end of text (a line end where the tokenizer has no
    such token). Measured by the share of held-out questions whose whole answer the model would
    write greedily: that is so exactly when, given the right answer, every next token is the most
    probable one, so that one forward pass tells.

    Args:
        train: (question, answer) pairs.
        held_out: pairs for evaluation.
        tokenizer: of both.
        name: name of the task.
        max_eval: at most this many held-out pairs are evaluated, evenly spaced.

    Raises:
        ValueError: no pairs to train on or to evaluate.
    """

    metric = "exact_match"
    higher_is_better = True
    chance = 0.0

    def __init__(
        self,
        train: Sequence[tuple[str, str]],
        held_out: Sequence[tuple[str, str]],
        tokenizer: Tokenizer,
        *,
        name: str = "questions",
        max_eval: int = 1000,
    ) -> None:
        if not train or not held_out:
            raise ValueError(
                f"{name} ({len(train)} records to train on, {len(held_out)} held out) must have at "
                "least one of each; give more records."
            )
        self.name, self.min_vocab_size = name, tokenizer.vocab_size
        self._end = tokenizer.encode("\n")
        self._stop = self._end if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        self._train = _Sequences([self._tokens(tokenizer, *record) for record in train])
        step = max(1, -(-len(held_out) // max_eval))
        self._held_out = _Sequences([self._tokens(tokenizer, *r) for r in held_out[::step]])
        self._fitting: tuple[int, Tensor] = (-1, torch.empty(0))
        self._warned = False

    def _tokens(self, tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], int]:
        prompt = tokenizer.encode(question) + self._end
        return prompt + tokenizer.encode(answer) + self._stop, len(prompt)

    @property
    def fingerprint(self) -> str:
        """Name, and a digest of the training records."""
        digest = hashlib.blake2b(self._train.tokens.numpy().data, digest_size=8).hexdigest()
        return f"{self.name}/{digest}"

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Random records; those longer than ``seq_len`` are never drawn, which is warned of once.

        Raises:
            ValueError: every record is longer.
        """
        if self._fitting[0] != seq_len:
            self._fitting = (seq_len, self._records_up_to(seq_len))
        records = self._fitting[1]
        chosen = records[torch.randint(len(records), (batch_size,), generator=generator)]
        return self._train.batch(chosen)

    def _records_up_to(self, seq_len: int) -> Tensor:
        lengths = self._train.lengths
        fitting = (lengths <= seq_len).nonzero()[:, 0]
        if not len(fitting):
            raise ValueError(
                f"seq_len (={seq_len}) must be at least {int(lengths.min())}, the tokens of the "
                f"shortest record of task {self.name}."
            )
        if len(fitting) < len(lengths):
            warnings.warn(
                f"{len(lengths) - len(fitting)} of {len(lengths)} records of task {self.name} are "
                f"longer than seq_len (={seq_len}) and are not trained on; the longest has "
                f"{int(lengths.max())} tokens.",
                stacklevel=3,
            )
        return fitting

    def measure(self, model: nn.Module, device: torch.device) -> float:
        """Share of held-out questions that are answered right, the end included.

        Those that are longer than the model can read count as wrong, which is warned of once.
        """
        right = 0
        for chosen in self._readable(model).split(EVAL_BATCH):
            batch = self._held_out.batch(chosen)
            logits = model(batch.input_ids.to(device))["logits"][:, :-1]
            labels = batch.labels[:, 1:].to(device)
            agrees = (logits.argmax(dim=-1) == labels) | (labels == IGNORE_INDEX)
            right += int(agrees.all(dim=1).sum())
        return right / len(self._held_out.lengths)

    def _readable(self, model: nn.Module) -> Tensor:
        """The held-out records that ``model`` can read, the shortest first."""
        lengths = self._held_out.lengths
        limit = getattr(getattr(model, "config", None), "max_seq_len", int(lengths.max()))
        fitting = int((lengths <= limit).sum())
        if fitting < len(lengths) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(lengths) - fitting} of {len(lengths)} held-out records of task {self.name} "
                f"are longer than max_seq_len (={limit}) and count as wrong; the longest has "
                f"{int(lengths.max())} tokens.",
                stacklevel=4,
            )
        return lengths.argsort()[:fitting]


class _Sequences:
    """Token sequences of different lengths in one tensor."""

    def __init__(self, sequences: Sequence[tuple[list[int], int]]) -> None:
        self.lengths = torch.tensor([len(tokens) for tokens, _ in sequences])
        self.prompt_lengths = torch.tensor([prompt for _, prompt in sequences])
        self.starts = self.lengths.cumsum(0) - self.lengths
        flat = [token for tokens, _ in sequences for token in tokens]
        self.tokens = torch.tensor(flat, dtype=torch.int32)

    def batch(self, chosen: Tensor) -> Batch:
        """Records ``chosen`` [rows], padded at the end; padding and prompts do not count."""
        lengths = self.lengths[chosen][:, None]
        places = torch.arange(int(lengths.max()))
        inside = places < lengths
        positions = (self.starts[chosen][:, None] + places).clamp(max=len(self.tokens) - 1)
        tokens = torch.where(inside, self.tokens[positions].long(), 0)
        counted = inside & (places >= self.prompt_lengths[chosen][:, None])
        return Batch(tokens, torch.where(counted, tokens, IGNORE_INDEX))
