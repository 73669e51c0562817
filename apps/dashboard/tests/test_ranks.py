"""Whether the processes agreed."""

from __future__ import annotations

from pathlib import Path

from blockell_dashboard.io import LoadedRun
from blockell_dashboard.ranks import Divergence, find_divergence


def test_agreement_and_nothing_recorded() -> None:
    assert find_divergence({}) is None
    assert find_divergence({5: {"fc": ("a",)}, 9: {"fc": ("b", "b")}}) is None


def test_the_first_step_and_layer_that_differ_are_found() -> None:
    sums = {
        30: {"a": ("x", "y", "y"), "b": ("x", "x", "x")},
        20: {"a": ("x", "x", "x"), "b": ("x", "y", "x")},
        10: {"a": ("x", "x", "x"), "b": ("x", "x", "x")},
    }
    assert find_divergence(sums) == Divergence(20, "b", ((0, 2), (1,)), steps=2, layers=1)


def test_a_recorded_run(task_run: Path, good_run: Path) -> None:
    found = Divergence(75, "blocks.1.fc", ((0,), (1,)), steps=2, layers=1)
    assert LoadedRun(task_run).divergence() == found
    assert LoadedRun(good_run).divergence() is None
