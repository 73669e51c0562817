"""Snapshots whose bytes changed after they were written: no wrong value is ever returned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from blockell_format.snapshots import SnapshotError, open_run

LAYERS = ("blocks.0.fc1", "blocks.0.fc2")
FIELDS = ("col_indices", "block_age_steps", "block_score", "swapped", "previous_columns")


def places(path: Path) -> dict[str, range]:
    """Of every tensor the bytes of the file that hold it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: range(8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@given(data=st.data())
def test_every_flipped_bit_is_noticed(data: st.DataObject, run_maker: Any) -> None:
    path = run_maker.path / "topology" / "step-00000200.safetensors"
    if not run_maker.path.exists():
        run_maker.make(100, 200)
        run_maker.options["original"] = path.read_bytes()
    path.write_bytes(run_maker.options["original"])
    tensors = places(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    layer, field = name.rsplit("/", 1)
    content = bytearray(run_maker.options["original"])
    content[data.draw(st.sampled_from(tensors[name]))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    run = open_run(run_maker.path)
    expected = rf"layer '{layer}' dropped: {field} has CRC-32 [0-9a-f]{{8}}, was written with "
    with pytest.raises(SnapshotError, match=expected):
        run.snapshot(200).layer(layer)
    [problem] = run.verify()
    assert problem.path == path
    assert re.match(expected, problem.reason)
    assert problem.reason.endswith("the file was damaged since; restore it from a copy")
    assert [step for step, _ in run.read_layer(layer)] == [100]
    others = [other for other in FIELDS if other != field]
    assert [step for step, _ in run.read_layer(layer, fields=others)] == [100, 200]
    [other_layer] = set(LAYERS) - {layer}
    assert [step for step, _ in run.read_layer(other_layer)] == [100, 200]


def with_sums(path: Path, sums: str | None) -> None:
    with safe_open(str(path), framework="np") as file:
        metadata = file.metadata()
    del metadata["crc32"]
    save_file(load_file(path), path, metadata=metadata | ({} if sums is None else {"crc32": sums}))


def test_files_without_sums_are_read(run_maker: Any) -> None:
    [path] = run_maker.make(100)
    before = vars(open_run(run_maker.path).snapshot(100).layer(LAYERS[0]))
    with_sums(path, None)
    run = open_run(run_maker.path)
    for field, array in vars(run.snapshot(100).layer(LAYERS[0])).items():
        assert np.array_equal(array, before[field])
    assert run.verify() == []


@pytest.mark.parametrize(
    "sums",
    [
        "",
        "{",
        "{}",
        "[]",
        "[1,2]",
        "[[],[]]",
        '["a",null]',
        f'["{"a" * 40}","{"A" * 40}"]',
        "[" * 9**5,
    ],
)
def test_sums_that_are_none(run_maker: Any, sums: str) -> None:
    path, _ = run_maker.make(100, 200)
    with_sums(path, sums)
    run = open_run(run_maker.path)
    with pytest.raises(SnapshotError, match=r"'blocks\.0\.fc2' dropped: "):
        run.snapshot(100).layer(LAYERS[1])
    assert [step for step, _ in run.read_layer(LAYERS[1])] == [200]
    assert run.steps == [100, 200]
