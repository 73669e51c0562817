"""The made-up run is a valid run that behaves like one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard.example import write_example_run
from blockell_format.snapshots import open_run


def test_the_example_is_a_run_without_problems(good_run: Path) -> None:
    run = open_run(good_run)
    assert run.config["made_up"] is True
    assert len(run.steps) == 12
    for name in run.layers:
        previous = None
        for _, layer in run.read_layer(name):
            if previous is not None:
                changed = layer.col_indices != previous
                np.testing.assert_array_equal(changed, layer.swapped)
                np.testing.assert_array_equal(layer.previous_columns, previous)
            previous = layer.col_indices
    assert run.problems == []


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    runs = [open_run(write_example_run(tmp_path / name, decisions=3)) for name in ("a", "b")]
    assert runs[0].checksums() == runs[1].checksums()


def test_an_existing_run_is_not_overwritten(good_run: Path) -> None:
    with pytest.raises(FileExistsError):
        write_example_run(good_run)
