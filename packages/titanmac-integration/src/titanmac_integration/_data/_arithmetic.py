"""Generated additions, with held-out pairs that training never sees."""

import hashlib

import torch
from torch import Tensor, nn

from titanmac_integration._labels import IGNORE_INDEX
from titanmac_integration._metrics import exact_match

from ._tasks import Batch, Task
from ._tokenizer import ByteTokenizer


class ArithmeticTask(Task):
    """Sums of two numbers, every number written with its least significant digit first.

    57 + 68 = 125 is the line ``75+86=521\\n``: numbers padded with zeros to a fixed width, so that
    a carry only ever moves to the right, the order in which the answer is produced. A small model
    learns this form sooner and on more seeds than numbers written the usual way round.

    A sequence is one problem; only the bytes of its answer count in the loss. A problem is held
    out together with its commuted twin: if 57+68 is held out, 68+57 is too.

    Args:
        n_digits: digits per operand, 1 to 3.
        held_out: share of the pairs that are kept for evaluation.
        max_eval: at most this many held-out problems are evaluated.
        seed: chooses the held-out pairs.
    """

    name = "arithmetic"
    metric = "exact_match"
    higher_is_better = True

    def __init__(
        self, *, n_digits: int = 2, held_out: float = 0.1, max_eval: int = 1000, seed: int = 0
    ) -> None:
        if n_digits not in (1, 2, 3):
            raise ValueError(f"n_digits (={n_digits}) must be 1, 2 or 3.")
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"held_out (={held_out}) must be between 0 and 1; try 0.1.")
        if max_eval < 1:
            raise ValueError(f"max_eval (={max_eval}) must be at least 1.")
        self.n_digits = n_digits
        self.prompt_length = 2 * n_digits + 2
        """Bytes up to and with the equals sign."""
        self.answer_length = n_digits + 2
        """Digits of the sum and the line end."""
        self.problem_length = self.prompt_length + self.answer_length
        """Bytes of a problem, line end included."""
        numbers = 10**n_digits
        # Guessing the most frequent sum, numbers - 1, is right for `numbers` of numbers^2 pairs.
        self.chance = 1.0 / numbers
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.combinations(torch.arange(numbers), with_replacement=True)
        pairs = pairs[torch.randperm(len(pairs), generator=generator)]
        n_held_out = max(1, round(held_out * len(pairs)))
        self.train_pairs = _both_orders(pairs[n_held_out:])
        """int64 [problems, 2]."""
        self.held_out_pairs = _both_orders(pairs[:n_held_out])
        """int64 [problems, 2]; no pair of these, in either order, is in ``train_pairs``."""
        self._train = self.encode(self.train_pairs)
        kept = torch.randperm(len(self.held_out_pairs), generator=generator)[:max_eval]
        self._held_out = self.encode(self.held_out_pairs[kept])

    @property
    def fingerprint(self) -> str:
        """Name, digits and the held-out pairs."""
        digest = hashlib.blake2b(self.held_out_pairs.numpy().data, digest_size=8).hexdigest()
        return f"{self.name}/{self.n_digits}/{digest}"

    def encode(self, pairs: Tensor) -> Tensor:
        """Problems as bytes: ``pairs`` int64 [n, 2] -> int64 [n, problem_length]."""
        left, right = pairs.unbind(dim=1)
        n = len(pairs)
        plus, equals, end = (torch.full((n, 1), ord(sign)) for sign in "+=\n")
        parts = (
            _digits(left, self.n_digits),
            plus,
            _digits(right, self.n_digits),
            equals,
            _digits(left + right, self.n_digits + 1),
            end,
        )
        return torch.cat(parts, dim=1)

    def text(self, left: int, right: int) -> str:
        """One problem as it is written, for example ``"75+86=521\\n"`` for 57 and 68."""
        return ByteTokenizer().decode(self.encode(torch.tensor([[left, right]]))[0].tolist())

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """As many training problems, one per row, as fit into ``batch_size * seq_len`` tokens.

        So a step costs about the same for every task of a sequence or mixture.
        """
        rows = batch_size * seq_len // self.problem_length
        if seq_len < self.problem_length:
            raise ValueError(
                f"seq_len (={seq_len}) must be at least {self.problem_length}, the bytes of one "
                "problem."
            )
        problems = self._train[torch.randint(len(self._train), (rows,), generator=generator)]
        labels = problems.clone()
        labels[:, : self.prompt_length] = IGNORE_INDEX
        return Batch(problems, labels)

    def measure(self, model: nn.Module, device: torch.device) -> float:
        """Share of held-out problems whose whole answer the model would write greedily.

        That is so exactly when, given the right answer, every next byte is the most probable one.
        """
        problems = self._held_out.to(device)
        written = model(problems[:, :-1])["logits"][:, self.prompt_length - 1 :].argmax(dim=-1)
        return exact_match(written, problems[:, self.prompt_length :])


def _digits(numbers: Tensor, width: int) -> Tensor:
    """ASCII digits, least significant first: int64 [n] -> int64 [n, width]."""
    powers = 10 ** torch.arange(width)
    return numbers[:, None] // powers % 10 + ord("0")


def _both_orders(pairs: Tensor) -> Tensor:
    """The pairs and, where the two numbers differ, their commuted twins."""
    different = pairs[:, 0] != pairs[:, 1]
    return torch.cat((pairs, pairs[different].flip(1)))
