"""Garbage in metrics.jsonl: bad lines are listed by number, the rest is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockell_format.snapshots import Run, open_run
from blockell_format.snapshots._metrics import MAX_LINE_BYTES, MAX_LISTED, MetricsReader

GOOD = b'{"step": 7, "attempt": 1, "time": 1.5, "metrics": {"loss": 0.25}}'


def metrics_file(run_maker: Any, content: bytes, age_seconds: float = 3600) -> Path:
    if not run_maker.path.exists():
        run_maker.make()
    path: Path = run_maker.path / "metrics.jsonl"
    path.write_bytes(content)
    then = path.stat().st_mtime - age_seconds
    os.utime(path, (then, then))
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "Expecting value"),
        (b'{"step": 1, "metrics": {}', "delimiter"),
        (b'[{"step": 1}]', 'is not an object with "step" and "metrics"'),
        (b'{"step": 1}', 'is not an object with "step" and "metrics"'),
        (b'{"step": 1, "metrics": [1]}', 'is not an object with "step" and "metrics"'),
        (b'{"metrics": {}}', '"step" is not an integer in [0,'),
        (b'{"step": -1, "metrics": {}}', '"step" is not an integer in [0,'),
        (b'{"step": true, "metrics": {}}', '"step" is not an integer in [0,'),
        (b'{"step": 1.5, "metrics": {}}', '"step" is not an integer in [0,'),
        (b'{"step": NaN, "metrics": {}}', '"step" is not an integer in [0,'),
        (b'{"step": ' + b"9" * 10_000 + b', "metrics": {}}', ""),
        (b'{"step": 1, "attempt": 0, "metrics": {}}', '"attempt" is not an integer in [1,'),
        (b'{"step": 1, "metrics": {"a": "\xff\xfe"}}', "codec can't decode"),
        (b'{"step": 1, "metrics": {"a": "\\ud800"}}', "not valid Unicode"),
        (b'{"step": 1, "metrics": {"\\udcff": 1}}', "not valid Unicode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\x00" * 50, ""),
        (b"\xff\xfe{\x00}\x00", "codec can't decode"),
        (b"x" * (MAX_LINE_BYTES + 1), "is too long"),
    ],
)
def test_bad_line(run_maker: Any, line: bytes, reason: str) -> None:
    path = metrics_file(run_maker, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    run = open_run(run_maker.path)
    assert run.metrics() == [{"step": 7, "loss": 0.25}] * 2
    [problem] = run.problems
    assert problem.path == path
    assert problem.reason.startswith("line 2 dropped: ")
    assert reason in problem.reason
    str(problem).encode()


@pytest.mark.parametrize("depth", [300, 700, 950, 5000])
def test_a_nested_line_is_read_or_dropped(run_maker: Any, depth: int) -> None:
    nested = b'{"step": 8, "metrics": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
    metrics_file(run_maker, nested + b"\n" + GOOD + b"\n")
    run = open_run(run_maker.path)
    assert run.metrics()[-1] == {"step": 7, "loss": 0.25}
    reasons = [problem.reason for problem in run.problems]
    assert reasons in ([], ["line 1 dropped: nested too deeply"])
    assert len(run.metrics()) == 2 - len(reasons)


def test_harmless_oddities(run_maker: Any) -> None:
    lines = [b"", b"   ", GOOD + b"\r", GOOD.replace(b"}}", b', "extra": NaN}}')]
    metrics_file(run_maker, b"\n".join([*lines, b""]))
    run = open_run(run_maker.path)
    assert [line["step"] for line in run.metrics()] == [7, 7]
    assert run.problems == []


def test_many_bad_lines_are_counted(run_maker: Any) -> None:
    metrics_file(run_maker, b"bad\n" * (MAX_LISTED + 50) + GOOD + b"\n")
    run = open_run(run_maker.path)
    assert len(run.metrics()) == 1
    assert len(run.problems) == MAX_LISTED + 1
    assert run.problems[-1].reason == "50 more bad lines dropped"


def test_a_line_without_end_is_not_collected(run_maker: Any) -> None:
    path = metrics_file(run_maker, GOOD + b"\n")
    with open(path, "ab") as file:
        file.truncate(200 << 20)  # sparse: zeros without a line end
    reader = MetricsReader(path)
    reader.update()
    assert len(reader.records) == 1
    assert len(reader._tail) <= MAX_LINE_BYTES
    assert [problem.reason for problem in reader.problems][:1] == ["line 2 dropped: is too long"]
    with open(path, "ab") as file:
        file.write(b"\n" + GOOD + b"\n")
    reader.update()
    assert len(reader.records) == 2
    assert len(reader.problems) == 1


def test_half_written_line_of_a_live_run(run_maker: Any) -> None:
    path = metrics_file(run_maker, GOOD + b"\n" + GOOD[:20], age_seconds=0)
    run = open_run(run_maker.path)
    assert len(run.metrics()) == 1
    assert run.problems == []
    with open(path, "ab") as file:
        file.write(GOOD[20:] + b"\n")
    assert run.refresh()
    assert len(run.metrics()) == 2
    assert run.problems == []


def test_half_written_line_that_stays(run_maker: Any) -> None:
    path = metrics_file(run_maker, GOOD + b"\n" + GOOD[:20], age_seconds=0)
    run = open_run(run_maker.path)
    assert run.problems == []
    os.utime(path, (1, 1))
    assert run.refresh()
    assert [problem.reason for problem in run.problems] == ["line 2 has no end and is not read"]
    assert not run.refresh()
    with open(path, "ab") as file:  # it does go on after all
        file.write(GOOD[20:] + b"\n")
    assert run.refresh()
    assert run.problems == []
    assert len(run.metrics()) == 2


def reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that one refresh reads."""
    real, total = os.read, 0

    def counted(fd: int, size: int) -> bytes:
        nonlocal total
        data = real(fd, size)
        total += len(data)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", counted)
        run.refresh()
    return total


def test_reading_goes_on_where_it_stopped(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_maker.writer() as writer:
        for step in range(1000):
            writer.log({"loss": 0.5}, step)
        run = open_run(run_maker.path)
        size = (run_maker.path / "metrics.jsonl").stat().st_size
        assert reads(run, monkeypatch) == 0
        first = run.metrics()
        writer.log({"loss": 0.25}, 1000)
        assert 0 < reads(run, monkeypatch) < size / 100
        second = run.metrics()
    assert len(second) == 1001
    assert all(a is b for a, b in zip(first, second, strict=False))
    assert second[-1] == {"step": 1000, "loss": 0.25}


@pytest.mark.parametrize("replace", [True, False])
def test_replaced_file_is_read_anew(run_maker: Any, replace: bool) -> None:
    path = metrics_file(run_maker, (GOOD + b"\n") * 5)
    run = open_run(run_maker.path)
    assert len(run.metrics()) == 5
    if replace:
        other = path.with_name("other")
        other.write_bytes((GOOD.replace(b"7", b"8") + b"\n") * 9)
        os.replace(other, path)
    else:
        path.write_bytes((GOOD.replace(b"7", b"8") + b"\n") * 2)
    assert run.refresh()
    assert {line["step"] for line in run.metrics()} == {8}
    assert len(run.metrics()) == (9 if replace else 2)


def test_a_longer_file_in_the_same_place_is_read_anew(run_maker: Any) -> None:
    path = metrics_file(run_maker, (GOOD + b"\n") * 2)
    run = open_run(run_maker.path)
    assert len(run.metrics()) == 2
    path.write_bytes((GOOD.replace(b"7", b"8") + b"\n") * 9)  # same inode, more bytes
    assert run.refresh()
    assert [line["step"] for line in run.metrics()] == [8] * 9


def test_unreadable_file(run_maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = metrics_file(run_maker, GOOD + b"\n")
    run = open_run(run_maker.path)
    path.unlink()
    path.mkdir()
    run.refresh()
    assert len(run.metrics()) == 1  # what was read before stays
    assert len(run.problems) == 1
    path.rmdir()
    os.mkfifo(path)
    assert open_run(run_maker.path).problems[0].reason == "is not a regular file"
    path.unlink()
    run = open_run(run_maker.path)
    assert (run.metrics(), run.problems) == ([], [])


def test_every_split_into_chunks_gives_the_same(run_maker: Any) -> None:
    lines = [GOOD, b"bad", b"", GOOD.replace(b"7", b"8"), b'{"step":']
    content = b"\n".join(lines)
    whole = MetricsReader(Path("whole"))
    whole._take(content)
    for cut in range(len(content)):
        parts = MetricsReader(Path("whole"))
        parts._take(content[:cut])
        parts._take(content[cut:])
        assert parts.records == whole.records
        assert parts.problems == whole.problems


@given(content=st.binary(max_size=300), newlines=st.integers(0, 5))
def test_any_bytes_are_survived(content: bytes, newlines: int, run_maker: Any) -> None:
    step = max(1, len(content) // (newlines + 1))
    pieces = [content[i : i + step] for i in range(0, len(content), step)]
    metrics_file(run_maker, GOOD + b"\n" + b"\n".join(pieces) + b"\n" + GOOD + b"\n")
    run = open_run(run_maker.path)
    steps = [line["step"] for line in run.metrics()]
    assert steps[0] == steps[-1] == 7
    json.dumps([str(problem) for problem in run.problems], ensure_ascii=False).encode()
