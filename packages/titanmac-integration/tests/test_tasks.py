"""The built-in tasks: disjoint splits, formats, determinism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from titanmac_integration import (
    TASK_NAMES,
    ArithmeticTask,
    Batch,
    ByteTokenizer,
    Mixture,
    ProseTask,
    exact_match,
    make_task,
    sample_greedily,
)

ARITHMETIC = ArithmeticTask()
THREE_DIGITS = ArithmeticTask(n_digits=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Oracle(nn.Module):
    """Answers sums by calculating; spoils the answer's last digit on request."""

    def __init__(self, task: ArithmeticTask, *, spoil: bool = False) -> None:
        super().__init__()
        self.task, self.spoil = task, spoil
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        digits = self.task.n_digits
        place = 10 ** torch.arange(digits)
        left = ((tokens[:, :digits] - 48) * place).sum(1)
        right = ((tokens[:, digits + 1 : 2 * digits + 1] - 48) * place).sum(1)
        whole = self.task.encode(torch.stack((left, right), dim=1))
        wanted = whole[:, 1 : tokens.shape[1] + 1]
        logits = nn.functional.one_hot(wanted, 256).float()
        if self.spoil:
            logits[:, self.task.problem_length - 3 :, ord("7")] = 2.0
        return {"logits": logits}


def test_the_format_is_least_significant_digit_first() -> None:
    assert ARITHMETIC.text(57, 68) == "75+86=521\n"
    assert ARITHMETIC.text(3, 40) == "30+04=340\n"
    assert ArithmeticTask(n_digits=1).text(7, 8) == "7+8=51\n"


@settings(max_examples=100, deadline=None)
@given(left=st.integers(0, 999), right=st.integers(0, 999))
def test_every_sum_is_right(left: int, right: int) -> None:
    a, rest = THREE_DIGITS.text(left, right).rstrip("\n").split("+")
    b, total = rest.split("=")
    assert [int(number[::-1]) for number in (a, b, total)] == [left, right, left + right]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_pairs_are_disjoint_in_either_order(seed: int) -> None:
    task = ArithmeticTask(seed=seed)
    train = {tuple(pair) for pair in task.train_pairs.tolist()}
    held_out = {tuple(pair) for pair in task.held_out_pairs.tolist()}
    assert len(train) + len(held_out) == 10_000
    assert not train & held_out
    assert not train & {(b, a) for a, b in held_out}
    assert 900 < len(held_out) < 1100


def test_training_batches_hold_training_pairs_only() -> None:
    train = {ARITHMETIC.text(a, b) for a, b in ARITHMETIC.train_pairs.tolist()}
    batch = ARITHMETIC.batch(8, 64, seeded())
    assert batch.input_ids.shape == (8 * 64 // 10, 10)
    assert {ByteTokenizer().decode(row) for row in batch.input_ids.tolist()} <= train
    answer = batch.labels[:, 6:]
    assert torch.equal(answer, batch.input_ids[:, 6:])
    assert (batch.labels[:, :6] == -100).all()


def test_exact_match_is_of_the_whole_answer() -> None:
    assert ARITHMETIC.evaluate(Oracle(ARITHMETIC)) == 1.0
    assert ARITHMETIC.evaluate(Oracle(ARITHMETIC, spoil=True)) == 0.0
    small = ArithmeticTask(n_digits=1, max_eval=5)
    assert small.evaluate(Oracle(small)) == 1.0


class Sometimes(Oracle):
    """Right where the last byte it has read is not "3": an error changes what follows."""

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(tokens)["logits"]
        logits[tokens == ord("3")] = 0.0
        return {"logits": logits}


@pytest.mark.parametrize("task", [ARITHMETIC, THREE_DIGITS])
def test_one_pass_tells_what_would_be_written_greedily(task: ArithmeticTask) -> None:
    model, problems = Sometimes(task), task._held_out
    written = sample_greedily(model, problems[:, : task.prompt_length], task.answer_length)
    share = exact_match(written, problems[:, task.prompt_length :])
    assert 0.2 < share < 0.9
    assert task.evaluate(model) == share


def test_evaluation_puts_the_mode_back_and_needs_no_gradient() -> None:
    oracle = Oracle(ARITHMETIC).train()
    ARITHMETIC.evaluate(oracle)
    assert oracle.training
    ARITHMETIC.evaluate(oracle.eval())
    assert not oracle.training


class Uniform(nn.Module):
    """Knows nothing: every byte is equally probable."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.weight.expand(*tokens.shape, 256)}


def test_chance_levels_are_what_ignorance_gives() -> None:
    prose = ProseTask()
    assert prose.evaluate(Uniform()) == pytest.approx(prose.chance, rel=1e-6)
    sums = torch.bincount(torch.arange(100)[:, None].add(torch.arange(100)).flatten())
    assert sums.max() / sums.sum() == pytest.approx(ARITHMETIC.chance)


def test_prose_is_split_by_position() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    task = ProseTask(text, eval_length=20, eval_windows=7)
    whole = torch.cat((task.train_tokens, task.validation_tokens)).tolist()
    assert ByteTokenizer().decode(whole) == text
    assert len(task.validation_tokens) == 100
    assert task._validation.shape == (7, 21)
    batch = task.batch(50, 30, seeded())
    assert batch.input_ids.shape == (50, 30)
    text_of_training = text[:900]
    assert all(ByteTokenizer().decode(row) in text_of_training for row in batch.input_ids.tolist())


def test_the_built_in_prose_is_english() -> None:
    task = ProseTask()
    assert len(task.train_tokens) > 300_000
    text = ByteTokenizer().decode(task.train_tokens.tolist())
    assert " the " in text
    assert "statement" in text


@pytest.mark.parametrize("name", TASK_NAMES)
def test_batches_follow_the_generator(name: str) -> None:
    task = make_task(name)
    one, two, other = (task.batch(4, 32, seeded(s)).input_ids for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_mixture_draws_from_all_its_tasks() -> None:
    mixture = Mixture([ArithmeticTask(), ProseTask()])
    assert mixture.name == "arithmetic+prose"
    generator = seeded()
    lengths = {mixture.batch(4, 32, generator).input_ids.shape[1] for _ in range(20)}
    assert lengths == {10, 32}


def test_bad_settings_are_explained() -> None:
    with pytest.raises(ValueError, match=r"task \(='poetry'\) must be one of arithmetic, prose"):
        make_task("poetry")
    with pytest.raises(ValueError, match=r"n_digits \(=4\) must be 1, 2 or 3"):
        ArithmeticTask(n_digits=4)
    with pytest.raises(ValueError, match=r"held_out \(=0.0\) must be between 0 and 1"):
        ArithmeticTask(held_out=0.0)
    with pytest.raises(ValueError, match=r"max_eval \(=0\) must be at least 1"):
        ArithmeticTask(max_eval=0)
    with pytest.raises(ValueError, match=r"seq_len \(=9\) must be at least 10"):
        ARITHMETIC.batch(4, 9, seeded())
    with pytest.raises(ValueError, match=r"held_out \(=1\) must be between"):
        ProseTask("text", held_out=1)
    with pytest.raises(ValueError, match=r"eval_windows \(=0\) must be at least 1"):
        ProseTask("text", eval_windows=0)
    with pytest.raises(ValueError, match=r"text \(4 bytes\) must leave at least eval_length \+ 1"):
        ProseTask("text")
    with pytest.raises(ValueError, match=r"seq_len \(=91\) must be at most 90"):
        ProseTask("x" * 100, eval_length=5).batch(2, 91, seeded())
    with pytest.raises(ValueError, match=r"tasks .* must name at least one"):
        Mixture([])


def test_batch_is_a_pair() -> None:
    inputs, labels = ARITHMETIC.batch(1, 10, seeded())
    assert isinstance(ARITHMETIC.batch(1, 10, seeded()), Batch)
    assert inputs.shape == labels.shape
