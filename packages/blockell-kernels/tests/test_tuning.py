"""The tuning cache: what is measured is stored whole, found by class, and never trusted blindly."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from blockell_kernels import _tuning, _tuning_run, env, tune
from blockell_kernels._backends import Case
from blockell_kernels._tuning import Table, Timing

DEVICE = "NVIDIA Test 1"
HALF = "forward half 16x128"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own, and nothing remembered before or after."""
    monkeypatch.setenv("BLOCKELL_TUNING", str(tmp_path))
    _tuning.forget()
    yield tmp_path
    _tuning.forget()


def case(N=2048, in_features=640, out_features=2560, K=20, B=16, direction="forward"):
    sizes = N, out_features // B, in_features // B, K, B, 128 // B
    return Case(direction, torch.device("cuda"), torch.bfloat16, *sizes)


def table(*rows, key=HALF, date="2026-01-02"):
    return Table(DEVICE, date, {key: [Timing(*row) for row in rows]})


SLOW = (2048, 640, 2560, 0.5, 20.0, 10.0)
FAST = (2048, 640, 2560, 0.25, 8.0, 10.0)


def test_what_is_written_is_read(folder):
    path = _tuning.write(table(SLOW, FAST))
    assert path.parent == folder
    assert [p.name for p in folder.iterdir()] == [path.name]  # no part of a file is left
    assert _tuning.table_for(DEVICE) == table(FAST, SLOW)


def test_a_second_run_adds_and_replaces():
    _tuning.write(table(SLOW, FAST))
    faster = (*SLOW[:4], 9.0, 10.0)
    _tuning.write(table(faster, (32, 640, 2560, 0.5, 5.0, 6.0), date="2026-02-01"))
    found = _tuning.table_for(DEVICE)
    assert found.date == "2026-02-01"
    assert found.cells[HALF] == [(32, 640, 2560, 0.5, 5.0, 6.0), FAST, faster]


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = _tuning.write(table(SLOW))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_tuning.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _tuning.write(table(FAST))
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "device": "x", "date": "d", "cells": {}}',
        '{"format": 1, "device": "x", "date": "d", "cells": {"a": [[1, 2]]}}',
        '{"format": 1, "device": "x", "date": "d", "cells": {"a": [[1, 2, 3, 0.5, -1, 2]]}}',
        '{"format": 1, "device": "x", "date": "d", "cells": {"a": [[1, 2, 3, 0.5, NaN, 2]]}}',
        '{"format": 1, "device": "x", "date": "d", "cells": []}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_reported_once_and_ignored(content):
    path = _tuning.file_for(DEVICE)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=r"tuning cache .* is ignored: .*measure again"):
        assert _tuning.table_for(DEVICE) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuning.table_for(DEVICE) is None


def test_a_damaged_file_is_replaced_by_a_new_measurement():
    _tuning.file_for(DEVICE).write_text("{")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        _tuning.write(table(FAST))
    assert _tuning.table_for(DEVICE) == table(FAST)


def test_the_environment_moves_it_and_switches_it_off(monkeypatch, tmp_path):
    monkeypatch.delenv("BLOCKELL_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _tuning.directory() == tmp_path / "xdg" / "blockell-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _tuning.directory() == tmp_path / "home" / ".cache" / "blockell-kernels"
    monkeypatch.setenv("BLOCKELL_TUNING", "OFF")
    assert _tuning.file_for(DEVICE) is None
    assert _tuning.table_for(DEVICE) is None
    with pytest.raises(ValueError, match=r"BLOCKELL_TUNING \(='OFF'\) switches the tuning cache"):
        _tuning.write(table(FAST))


def test_other_versions_have_other_files(monkeypatch):
    first = _tuning.file_for(DEVICE)
    monkeypatch.setattr(env, "version_of", lambda name: "99.0")
    assert _tuning.file_for(DEVICE) != first


def test_a_verdict_says_what_it_rests_on():
    wins, why = _tuning.judge(table(SLOW, FAST), case(K=10), "half")
    assert wins
    assert "measured on this NVIDIA Test 1 (2026-01-02, tuning cache)" in why
    assert "N=2048, 640 -> 2560, density 0.25 takes 8.0 us sparse and 10.0 us dense" in why
    assert not _tuning.judge(table(SLOW, FAST), case(K=20), "half").wins


@pytest.mark.parametrize(
    ("K", "wins"),
    # ratios 0.8 at 25% and 2.0 at 50%: equal at 29%; in proportion above the last
    [(1, True), (11, True), (12, False), (40, False)],
)
def test_between_measured_densities_the_ratio_is_interpolated(K, wins):
    assert _tuning.judge(table(SLOW, FAST), case(K=K), "half").wins == wins


def test_above_the_densest_measurement_nothing_is_presumed():
    assert not _tuning.judge(table(FAST), case(K=40), "half").wins  # 0.8 at 25%, 3.2 at 100%
    assert _tuning.judge(table(FAST), case(K=12), "half").wins  # 0.96


@pytest.mark.parametrize("N", [1500, 2000, 2048, 2800])
def test_a_new_number_of_tokens_finds_its_class(N):
    assert _tuning.judge(table(FAST), case(N=N, K=10), "half") is not None


@pytest.mark.parametrize(
    "other",
    [
        {"N": 512},
        {"N": 4096},
        {"in_features": 1280},
        {"B": 32},
        {"direction": "grad_input"},
    ],
    ids=str,
)
def test_another_class_is_not_answered(other):
    assert _tuning.judge(table(FAST), case(**({"K": 10} | other)), "half") is None


def test_another_arithmetic_is_not_answered():
    assert _tuning.judge(table(FAST), case(K=10), "float32") is None


def test_the_nearest_shape_of_a_class_decides():
    rows = table((1500, 640, 2560, 0.25, 1.0, 2.0), (2800, 640, 2560, 0.25, 2.0, 1.0))
    assert _tuning.judge(rows, case(N=1600, K=10), "half").wins
    assert not _tuning.judge(rows, case(N=2700, K=10), "half").wins


def test_the_dispatcher_reads_it_lazily_and_once(monkeypatch):
    pytest.importorskip("triton")
    from blockell_kernels._backends import get_backend

    reads = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    read = _tuning.read
    monkeypatch.setattr(_tuning, "read", lambda path: reads.append(path) or read(path))
    triton = get_backend("triton")
    assert "tuning cache" not in triton.verdict(case(K=20)).why
    _tuning.write(table((*FAST[:3], 0.5, 1.0, 9.0)))
    reads.clear()
    for N in (2000, 2048, 2100):
        wins, why = triton.verdict(case(N=N, K=20))
        assert wins
        assert "tuning cache" in why
    assert len(reads) == 1


@pytest.fixture
def measured(monkeypatch):
    """Measurements that need no GPU: which cases were asked for."""
    asked = []

    def measure(case):
        asked.append(case)
        sizes = case.N, case.C * case.B, case.R * case.B
        return Timing(*sizes, case.density, 1.0 * case.B, 2.0)

    pytest.importorskip("triton")
    monkeypatch.setattr(_tuning_run, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return asked


def test_a_run_measures_every_combination_once_and_stores_it(measured):
    lines = []
    path = tune.tune(
        [tune.Shape(640, 2560), tune.Shape(100, 100)],
        layouts=[tune.Layout(16, 8), tune.Layout(128, 1)],
        tokens=[512, 2048],
        densities=[0.1, 0.11, 0.5],
        report=lines.append,
    )
    # 100 is no multiple of a tile; 10% and 11% are the same number of 5 or 40 columns
    assert len(measured) == len(set(measured)) == 2 * 2 * 2 * 3
    assert len(lines) == len(measured)
    content = json.loads(path.read_text())
    assert content["device"] == DEVICE
    assert set(content["cells"]) == {
        f"{d} half {width}" for d in ("forward", "grad_input", "grad_values")
        for width in ("16x128", "128x128")
    }  # fmt: skip
    assert sum(map(len, content["cells"].values())) == len(measured)


def test_the_command(measured, capsys, folder):
    arguments = ["--shapes", "640x2560", "--layouts", "16x8", "--tokens", "64", "--densities", "1"]
    assert tune.main(arguments) == 0
    out = capsys.readouterr().out
    assert "forward half 16x128: N=64, 640 -> 2560, density 1.00: sparse 16.0 us" in out
    assert f"written to {folder}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "640"], "shape (='640') must have the form INxOUT"),
        (["--layouts", "16x0"], "layout (='16x0') must have the form TILExROWGROUP"),
        (["--tokens", "64", "0"], "tokens (=0) must be at least 1."),
        (["--densities", "0.5", "1.5"], "densities (=1.5) must be in (0, 1]."),
        (["--device", "cpu"], "device (='cpu') must be a CUDA device"),
        (
            ["--shapes", "100x100", "--layouts", "16x1"],
            "nothing to measure: no shape is a multiple",
        ),
    ],
)
def test_the_command_names_what_is_wrong(measured, capsys, arguments, message):
    assert tune.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_where_it_cannot_store(measured, capsys, monkeypatch):
    monkeypatch.setenv("BLOCKELL_TUNING", "off")
    assert tune.main([]) == 2
    assert "switches the tuning cache off" in capsys.readouterr().err


def test_nothing_to_measure_is_said(measured):
    with pytest.raises(ValueError, match="nothing to measure"):
        tune.tune([tune.Shape(100, 100)], layouts=[tune.Layout(16, 1)], tokens=[8])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_command_says_so(capsys):
    assert tune.main([]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err
