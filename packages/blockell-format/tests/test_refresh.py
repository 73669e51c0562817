"""A live run: refresh reads what is new and nothing else."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from blockell_format.snapshots import LayerInfo, _scan, open_run


@pytest.fixture
def header_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the snapshot files whose header is read."""
    seen: list[str] = []
    real = _scan.read_metadata

    def counted(path: Any) -> dict[str, str]:
        seen.append(str(path).rpartition("/")[2])
        return real(path)

    monkeypatch.setattr(_scan, "read_metadata", counted)
    return seen


def test_only_new_headers_are_read(run_maker: Any, header_reads: list[str]) -> None:
    with run_maker.writer() as writer:
        for step in (100, 200):
            run_maker.write(writer, step)
        run = open_run(run_maker.path)
        assert len(header_reads) == 2
        assert not run.refresh()
        assert len(header_reads) == 2
        run_maker.write(writer, 300)
        assert run.refresh()
        assert header_reads[2:] == ["step-00000300.safetensors"]
        assert run.steps == [100, 200, 300]
        writer.log({"a": 1}, 300)
        assert run.refresh()
        assert not run.refresh()
        assert len(header_reads) == 3


def test_bad_files_are_read_again_only_when_they_change(
    run_maker: Any, header_reads: list[str]
) -> None:
    [path] = run_maker.make(100)
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    run = open_run(run_maker.path)
    assert (run.steps, len(run.problems)) == ([], 1)
    assert not run.refresh()
    assert len(header_reads) == 1
    path.write_bytes(good)  # a copy that was not finished
    assert run.refresh()
    assert (run.steps, run.problems) == ([100], [])
    path.unlink()
    assert run.refresh()
    assert run.steps == []


def test_snapshot_that_is_open_stays_usable(run_maker: Any) -> None:
    run_maker.make(100, 200)
    run = open_run(run_maker.path)
    snapshot, steps = run.snapshot(200), run.steps
    run_maker.writer(mode="resume", resume_step=100).close()
    run.refresh()
    assert snapshot.layer("blocks.0.fc1").swapped.any()
    assert [step for step, _ in run.read_layer("blocks.0.fc1", steps)] == [100]


def test_refresh_from_many_threads(run_maker: Any) -> None:
    errors: list[BaseException] = []
    with run_maker.writer() as writer:
        run = open_run(run_maker.path)
        done = threading.Event()

        def follow() -> None:
            try:
                while not done.is_set():
                    run.refresh()
                    for step, layer in run.read_layer("blocks.0.fc1", fields=["col_indices"]):
                        assert layer.col_indices.shape == (6, 3), step
                    run.metrics()
                    run.swap_counts()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=follow) for _ in range(4)]
        for thread in threads:
            thread.start()
        for step in range(30):
            run_maker.write(writer, step)
            writer.log({"loss": 1.0}, step)
        done.set()
        for thread in threads:
            thread.join()
    run.refresh()
    assert errors == []
    assert (len(run.steps), len(run.metrics()), run.problems) == (30, 30, [])


def test_ten_thousand_snapshots_are_listed_and_not_read_again(
    run_maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers are those of 32 layers; only the tensors are small."""
    run_maker.layers = tuple(LayerInfo(f"blocks.{i}.mlp.fc", 1, 40, 1, 16) for i in range(32))
    checksums = {info.name: ["0123456789abcdef" * 2] for info in run_maker.layers}
    [path] = [run_maker.make(0)[0]]
    directory = path.parent
    content = path.read_bytes()
    # the same file under other steps: a digit string of the same length in the header
    start = content.index(b'"step":"0"') + len(b'"step":"')
    template = bytearray(content)
    assert len(checksums) == 32
    length = int.from_bytes(content[:8], "little")
    for step in range(1, 10_000):
        text = str(step).encode()
        header = bytes(template[8:start]) + text + bytes(template[start + 1 : 8 + length])
        size = len(header).to_bytes(8, "little")
        name = directory / f"step-{step:08d}.safetensors"
        name.write_bytes(size + header + content[8 + length :])
    run = open_run(run_maker.path)
    assert len(run.steps) == 10_000
    assert run.problems == []

    opened = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *a: opened.append(path) or real_open(path, *a))
    assert not run.refresh()
    assert not [path for path in opened if str(path).endswith(".safetensors")]
