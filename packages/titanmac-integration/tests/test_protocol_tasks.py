"""Tasks of the retention protocol: what is held out, and what a score measures."""

import json
from pathlib import Path

import pytest
import torch

from titanmac_integration import create_titanmac_model, sample_greedily
from titanmac_integration._protocol._problems import additions, from_pairs, reversals
from titanmac_integration._protocol._score import IGNORE_INDEX
from titanmac_integration._protocol._tasks import LETTERS, make_retention_task
from titanmac_integration._protocol._text import TextTask


def problems(rows: torch.Tensor, length: int) -> set[bytes]:
    return {bytes(row.tolist()) for row in rows.reshape(-1, length)}


def test_sums_are_right_and_twins_stay_together() -> None:
    task = additions()
    sets = [problems(task.rows(split).input_ids, 10) for split in ("validation", "test")]
    generator = torch.Generator().manual_seed(0)
    sets.append(problems(task.batch(400, 64, generator).input_ids, 10))
    pairs = []
    for found in sets:
        for line in found:
            left, right, total = line[:2], line[3:5], line[6:9]
            assert int(left[::-1]) + int(right[::-1]) == int(total[::-1])
            assert line[2:3] + line[5:6] + line[9:] == b"+=\n"
        pairs.append({frozenset((line[:2], line[3:5])) for line in found})
    assert all(map(len, pairs))
    assert not pairs[0] & pairs[1]
    assert not (pairs[0] | pairs[1]) & pairs[2]


def test_questions_count_a_tenth_and_answers_fully() -> None:
    task = additions()
    batch = task.batch(300, 64, torch.Generator().manual_seed(0))
    counted = (batch.labels != IGNORE_INDEX).view(300, -1, 10)
    assert counted[..., 6:].all()
    assert counted[..., :6].float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_letters_write_the_same_sums_in_the_symbols_of_prose() -> None:
    digits, letters = additions(), make_retention_task("letters")
    table = bytes.maketrans(b"0123456789+=\n", LETTERS.encode())
    for split in ("validation", "test"):
        plain = bytes(digits.rows(split).input_ids.flatten().tolist())
        assert plain.translate(table) == bytes(letters.rows(split).input_ids.flatten().tolist())
    prose = make_retention_task("prose").batch(64, 64, torch.Generator().manual_seed(0))
    assert set(LETTERS.encode()) <= set(prose.input_ids.flatten().tolist())


def test_reversals_use_the_symbols_of_the_sums() -> None:
    sums, backwards = additions(), reversals()
    assert set(sums.rows("test").input_ids.unique().tolist()) == set(
        backwards.rows("test").input_ids.unique().tolist()
    )
    line = bytes(backwards.rows("test").input_ids[0, :11].tolist())
    assert line[6:10] == line[:4][::-1]


def test_a_score_is_what_greedy_generation_gets_right(tiny_config) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    pairs = [(f"{i:03d}?", str(i % 2)) for i in range(40)]
    task = from_pairs("parity", pairs, seq_len=18)
    model = create_titanmac_model(tiny_config(), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):  # so far that some answers are right and some are not
        batch = task.batch(8, 18, generator)
        optimizer.zero_grad()
        model(batch.input_ids, batch.labels)["loss"].backward()
        optimizer.step()
    rows = task.rows("test")
    right = []
    for row, answers in zip(rows.input_ids, rows.answers, strict=True):
        for number in answers.unique():
            where = (answers == number).nonzero()[:, 0]
            if number >= 0:
                prompt = row[: where[0]][None]
                answer = sample_greedily(model.eval(), prompt, len(where))
                right.append(torch.equal(answer[0], row[where]))
    assert task.score(model, "test").value == pytest.approx(sum(right) / len(right))
    assert task.measure(model.eval(), torch.device("cpu")) == task.score(model, "test").value
    with pytest.raises(ValueError, match=r"split \(='train'\) must be one of validation, test"):
        task.score(model, "train")


def test_a_text_is_split_by_position() -> None:
    text = "".join(chr(ord("a") + i // 400) for i in range(8000))
    task = TextTask("letters", text, held_out=0.2, eval_windows=50, eval_length=9)
    train = set(task.batch(4000, 10, torch.Generator().manual_seed(0)).input_ids.unique().tolist())
    held = [set(task.rows(split).input_ids.unique().tolist()) for split in ("validation", "test")]
    assert max(train) < min(held[0]) <= max(held[0]) < min(held[1])
    assert task.normalised(8.0) == 0.0
    assert task.normalised(0.0) == 1.0
    for text in ("", "abc", "a" * 199):
        with pytest.raises(ValueError, match=r"short \(\d+ bytes\) must have at least 200 bytes"):
            TextTask("short", text, eval_length=9)
    TextTask("short", "a" * 200, eval_length=9)


def test_files_of_the_user(tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    text.write_text("It was a dark and stormy night. " * 100)
    task = make_retention_task(f"text:{text}", seq_len=16)
    assert (task.name, task.metric) == ("novel", "bits_per_byte")
    questions = tmp_path / "capitals.jsonl"
    lines = [{"question": f"capital of {i}?", "answer": "A" if i < 15 else "BB"} for i in range(20)]
    questions.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    task = make_retention_task(f"qa:{questions}", seq_len=64)
    assert (task.name, task.metric) == ("capitals", "exact_match")
    assert 0.5 < task.chance < 1.0
    written = bytes(task.rows("test").input_ids.flatten().tolist()).decode()
    assert "capital of" in written
    questions.write_text('{"question": "q"}\n')
    for line, message in (
        ('{"question": "q"}', 'line 1 must be a JSON object with "question" and "answer"'),
        ('["question", "answer"]', 'line 1 must be a JSON object with "question" and "answer"'),
        ("question", "line 1 must be a JSON object: Expecting value"),
        ('{"question": "1", "answer": 2}', r'line 1: answer \(=2\) must be a string, in ""'),
        ('{"question": null, "answer": "2"}', r"line 1: question \(=null\) must be a string"),
    ):
        questions.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            make_retention_task(f"qa:{questions}")
    for kind in ("qa", "text"):
        text.write_bytes(b"caf\xe9 " * 300)
        with pytest.raises(ValueError, match=r"novel.txt must be UTF-8 text, but is not at byte 3"):
            make_retention_task(f"{kind}:{text}")


def test_separators_of_lines_may_stand_in_strings_and_a_mark_before_all(tmp_path: Path) -> None:
    """Only a line feed ends a line of JSON; programs for Windows begin with a byte order mark."""
    questions = tmp_path / "marked.jsonl"
    lines = [{"question": f"a\u2028b\x85{i}?", "answer": str(i % 3)} for i in range(20)]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    questions.write_bytes(b"\xef\xbb\xbf" + text.encode())
    task = make_retention_task(f"qa:{questions}", seq_len=64)
    written = bytes(task.rows("test").input_ids.flatten().tolist()).decode()
    assert "a\u2028b\x85" in written
    with pytest.raises(ValueError, match=r"task same \(with 'x\\n' for every question it is"):
        from_pairs("same", [(f"{i}?", "x") for i in range(20)])


def test_a_question_asked_twice_is_not_both_trained_on_and_held_out() -> None:
    """Or learning by heart would look like learning."""
    pairs = [(f"{i % 40:02d}?", str(i % 40)) for i in range(120)]
    task = from_pairs("repeats", pairs, seq_len=64)
    parts = [
        problems(task._tokens, task.problem_length),
        *(problems(task.rows(s).input_ids, task.problem_length) for s in ("validation", "test")),
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert min(map(len, parts)) == 4
    with pytest.raises(ValueError, match=r"few \(9 different questions\) must have at"):
        from_pairs("few", [(str(i % 9), "a") for i in range(50)])
    often = [("a", "b")] * 100 + [(str(i), str(i)) for i in range(9)]
    for seed in range(3):
        with pytest.raises(ValueError, match=r"often \(109 problems\) must not repeat a"):
            from_pairs("often", often, seed=seed)


@pytest.mark.parametrize("name", ["sums", "text:", "qa", "permuted-digits:x", "split-digits"])
def test_unknown_tasks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r'must be one of "arithmetic"'):
        make_retention_task(name)


def test_rows_too_short_for_a_problem_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len \(=8\) must be at least 10"):
        additions().batch(1, 8, torch.Generator())
    with pytest.raises(ValueError, match="must be 13 different characters"):
        additions(symbols="0123456789++\n")
