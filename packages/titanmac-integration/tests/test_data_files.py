"""Data from files: what is read, how it is split, what is refused."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from titanmac_integration import (
    ByteTokenizer,
    QuestionTask,
    TextTask,
    TitanMACConfig,
    Tokenizer,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
    load_data,
    make_tokenizer,
)

TEXT = "".join(f"{n} bottles of beer on the wall.\n" for n in range(300))
PAIRS = [(f"{a}+{b}", str(a + b)) for a in range(6) for b in range(5)]


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_is_split_by_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.md").write_bytes(b"\xff\x00 any bytes are fine" * 20)
    (task,) = load_data([tmp_path / "a.txt", tmp_path / "b.md"], held_out=0.25)
    assert isinstance(task, TextTask)
    n, m = len(TEXT), 21 * 20
    assert len(task.train_tokens) == n - n // 4 + m - m // 4
    decode = ByteTokenizer().decode
    assert decode(task.train_tokens[: n - n // 4]) == TEXT[: n - n // 4]
    assert decode(task.validation_tokens[: n // 4]) == TEXT[n - n // 4 :]
    batch = task.batch(3, 20, torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == (3, 20)
    assert batch.input_ids.dtype == torch.int64
    assert decode(batch.input_ids[0]) in decode(task.train_tokens)
    assert task.chance == 8.0


def test_texts_in_json_lines_end_with_a_token(tmp_path: Path) -> None:
    texts = [{"text": f"document {n}, naïve"} for n in range(10)]
    (task,) = load_data([write_lines(tmp_path / "a.jsonl", texts)], held_out=0.2)
    assert isinstance(task, TextTask)
    train = bytes(task.train_tokens.tolist())
    assert train == b"".join(f"document {n}, naïve".encode() + b"\0" for n in range(8))
    assert bytes(task.validation_tokens.tolist()).startswith(b"document 8")


def test_questions_count_their_answers_only(tmp_path: Path) -> None:
    records = [{"question": q, "answer": a, "source": 1} for q, a in PAIRS]
    (task,) = load_data([write_lines(tmp_path / "a.JSONL", [*records])], held_out=0.2)
    assert isinstance(task, QuestionTask)
    batch = task.batch(8, 7, torch.Generator().manual_seed(0))
    assert batch.input_ids.shape[0] == 8
    for tokens, labels in zip(batch.input_ids, batch.labels, strict=True):
        question, rest = bytes(tokens.tolist()).split(b"\n")
        answer = rest.split(b"\0")[0]
        assert (question.decode(), answer.decode()) in PAIRS[:24]
        counted = labels[labels != -100].tolist()
        assert bytes(counted) == answer + b"\0"
        assert labels[: len(question) + 1].tolist() == [-100] * (len(question) + 1)


def test_exact_match_is_what_greedy_writing_gives(tmp_path: Path) -> None:
    """The one-pass measure agrees with writing token by token, for a model half right."""
    config = TitanMACConfig(
        d_model=32, n_heads=4, n_layers=2, d_ff=64, max_seq_len=16, window_size=8, n_persistent=2
    )
    model = create_titanmac_model(config, seed=0)
    task = QuestionTask(PAIRS, PAIRS, ByteTokenizer())
    settings = TrainingConfig(batch_size=16, seq_len=16, lr=1e-2, warmup_steps=5)
    Trainer(model, settings).fit(task, 100)
    model.eval()
    right = 0
    for question, answer in PAIRS:
        tokens = torch.tensor([[*question.encode(), 10]])
        start = tokens.shape[1]
        for _ in range(len(answer) + 1):
            following = model(tokens)["logits"][:, -1].argmax(-1)
            tokens = torch.cat((tokens, following[None]), dim=1)
        right += bytes(tokens[0, start:].tolist()) == answer.encode() + b"\0"
    assert 0 < right < len(PAIRS)
    assert task.evaluate(model) == pytest.approx(right / len(PAIRS))


def test_long_records_are_left_out_with_a_warning() -> None:
    pairs = [("a", "b"), ("a" * 50, "b")]
    task = QuestionTask(pairs, pairs, ByteTokenizer())
    generator = torch.Generator()
    with pytest.warns(UserWarning, match=r"1 of 2 records of task questions are longer than seq_"):
        batch = task.batch(8, 10, generator)
    assert batch.input_ids.shape[1] == 4
    task.batch(8, 10, generator)  # warned once
    with pytest.raises(ValueError, match=r"seq_len \(=3\) must be at least 4"):
        task.batch(8, 3, generator)


def test_questions_too_long_to_read_count_as_wrong() -> None:
    config = TitanMACConfig.preset("demo", max_seq_len=16)
    model = create_titanmac_model(config, seed=0)
    task = QuestionTask([("a", "b")], [("a", "b"), ("a" * 50, "b")], ByteTokenizer())
    Trainer(model, TrainingConfig(batch_size=4, seq_len=8, lr=1e-2, warmup_steps=0)).fit(task, 20)
    expected = r"1 of 2 held-out records of task questions are longer than max_seq_len \(=16\) and"
    with pytest.warns(UserWarning, match=expected):
        assert task.evaluate(model) == 0.5
    assert task.evaluate(model) == 0.5  # warned once


def test_a_file_may_change_after_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (task,) = load_data([tmp_path / "a.txt"])
    assert isinstance(task, TextTask)
    before = task.train_tokens.tolist()
    (tmp_path / "a.txt").write_text("")  # a mapped file would now end the process
    assert task.train_tokens.tolist() == before


def test_texts_and_questions_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    mixed = [
        {"text": "a text"},
        {"text": "more"},
        *({"question": q, "answer": a} for q, a in PAIRS),
    ]
    tasks = load_data([tmp_path / "a.txt", write_lines(tmp_path / "b.jsonl", mixed)])
    assert [task.name for task in tasks] == ["text", "questions"]
    assert tasks[0].fingerprint != tasks[1].fingerprint
    (tmp_path / "a.txt").write_text(TEXT.upper())
    changed = load_data([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert changed[0].fingerprint != tasks[0].fingerprint
    assert changed[1].fingerprint == tasks[1].fingerprint


def test_a_pipe_cannot_be_read_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe must be a file, but is a pipe or a device"):
        load_data([tmp_path / "pipe"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a.txt \(0 bytes\) must have at least 2 bytes"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no record; data must not be empty"),
        (
            "a.jsonl",
            b'{"text": ""}\n' * 9,
            "a.jsonl holds only empty texts; data must not be empty",
        ),
        ("a.jsonl", b'{"text": "a"}\n', r"a.jsonl \(1 records\) must have at least 2 records"),
        ("a.jsonl", b'{"text": "a"}\n{"text":', "a.jsonl, line 2 must be a JSON object"),
        ("a.jsonl", b"[1]\n", r"line 1 \(='\[1\]'\) must be a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1 \(keys \['text'\]\) must have a string"),
        ("a.jsonl", b'\n{"question": "a"}\n', r"line 2 \(keys \['question'\]\) must have"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 must be a JSON object"),
        ("a.jsonl", b'{"text": "\\ud83d!"}\n', r"line 1 \('text' holds '\\ud83d' alone, half of a"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data([tmp_path / name])


def test_bad_calls_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"paths \(=\[\]\) must name at least one file"):
        load_data([])
    with pytest.raises(ValueError, match=r"held_out \(=1.5\) must be between 0 and 1"):
        load_data([tmp_path / "a"], held_out=1.5)
    with pytest.raises(FileNotFoundError):
        load_data([tmp_path / "a"])
    with pytest.raises(IsADirectoryError, match=r"name the files in it, for example .*\*\.txt\."):
        load_data([tmp_path])
    with pytest.raises(ValueError, match=r"tokenizer \(='words'\) must be \"bytes\" or the path"):
        make_tokenizer("words")


# -- Hugging Face's tokenizers ---------------------------------------------------------------------


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A byte-level BPE of 280 tokens, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT], vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = make_tokenizer(tokenizer_file)
    assert tokenizer.vocab_size == 280
    assert tokenizer.end_of_text == 0
    long = TEXT * 120 + "the end"  # above a million characters: cut at line ends
    tokens = tokenizer.encode(long)
    assert len(tokens) < len(long) / 2
    assert tokenizer.decode(tokens) == long
    text = TEXT + "é" * 60 + TEXT[:999]
    (tmp_path / "a.txt").write_text(text)
    (task,) = load_data([tmp_path / "a.txt"], tokenizer)
    assert isinstance(task, TextTask)
    assert task.min_vocab_size == 280
    assert 0.0 < task.tokens_per_byte < 1.0
    held_out = tokenizer.decode(task.validation_tokens)
    assert "éé" in held_out
    assert text.endswith(held_out)
    assert task.tokens_per_byte == len(task.validation_tokens) / len(held_out.encode())
    (questions,) = load_data(
        [write_lines(tmp_path / "a.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])],
        tokenizer,
    )
    batch = questions.batch(4, 32, torch.Generator())
    assert (batch.labels == 0).sum() == 4


def words(path: Path, tokens: dict[str, int], unknown: str | None) -> Tokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    options = {} if unknown is None else {"unk_token": unknown}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, **options))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    return make_tokenizer(path)


def test_tokens_may_be_left_out_of_a_vocabulary(tmp_path: Path) -> None:
    tokenizer = words(tmp_path / "words.json", {"one": 0, "two": 2, "?": 9}, "?")
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("one two three") == [0, 2, 9]


def test_text_that_a_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = words(tmp_path / "words.json", {"one": 0, "two": 1}, None)
    assert tokenizer.encode("two one") == [1, 0]
    message = r"tokenizer \(='.*words.json'\) must have tokens for all of the text: WordLevel error"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode("one three")


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tokenizer_file: Path) -> None:
    """A model that knows nothing needs log2(vocabulary) bits per token."""

    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.weight.expand(*tokens.shape, 280)}

    path = tokenizer_file.with_name("a.txt")
    path.write_text(TEXT)
    (task,) = load_data([path], make_tokenizer(tokenizer_file))
    assert task.evaluate(Uniform()) == pytest.approx(task.chance)


def test_a_broken_tokenizer_file(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer_file.write_text("{}")
    with pytest.raises(ValueError, match=r"must be a tokenizer\.json of Hugging Face's"):
        make_tokenizer(tokenizer_file)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9" * 100)
    with pytest.raises(ValueError, match=r"must be UTF-8 text for this tokenizer.* at byte 3"):
        load_data([latin], _Words())
    latin.write_bytes(b"cafe" * 100 + b"caf\xe9")
    with pytest.raises(ValueError, match=r"but is not at byte 403"):
        load_data([latin], _Words())


class _Words:
    """A tokenizer that takes text, not bytes: a word is its length."""

    vocab_size, end_of_text = 10, None

    def encode(self, text: str) -> list[int]:
        return [len(word) % 10 for word in text.split()]

    def decode(self, tokens: Iterable[int]) -> str:
        return " ".join("x" * length for length in tokens)
