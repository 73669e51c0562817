"""Runs of several tasks: which training a block was born in, and what changed between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockell_dashboard import figures, stats, tables
from blockell_dashboard.io import LoadedRun
from blockell_dashboard.layer_table import layer_table
from blockell_dashboard.tasks import MAX_TASKS, TaskSpan, birth_tasks, task_spans

SPANS = (TaskSpan("sums", 0, 50), TaskSpan("text", 50, 100))


def test_spans_count_over_all_trainings() -> None:
    assert task_spans({"tasks": ["sums", "text"], "steps": [50, 50]}) == SPANS


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tasks": ["sums"], "steps": [50]},
        {"tasks": ["sums"], "steps": 50},
        {"tasks": ["sums", "text"], "steps": 50},
        {"tasks": ["sums", "text"], "steps": [50]},
        {"tasks": ["sums", "text"], "steps": [50, -1]},
        {"tasks": ["sums", "text"], "steps": [50, True]},
        {"tasks": ["sums", "text"], "steps": [50, 10**30]},
        {"tasks": ["sums", 3], "steps": [50, 50]},
        {"tasks": "ab", "steps": [50, 50]},
        {"tasks": ["t"] * (MAX_TASKS + 1), "steps": [1] * (MAX_TASKS + 1)},
    ],
)
def test_other_configurations_state_no_sequence(config: dict[str, Any]) -> None:
    assert task_spans(config) == ()


def test_a_block_belongs_to_the_training_it_was_born_in() -> None:
    ages = np.array([100, 51, 50, 25, 0, 999])
    assert birth_tasks(ages, 100, SPANS).tolist() == [0, 0, 1, 1, 1, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_changes_between_snapshots_are_those_that_happened(seed: int, decisions: int) -> None:
    """Blocks that live on in their slot are kept; whatever else is there now was born."""
    rng = np.random.default_rng(seed)
    R, C, K = 5, 7, 4
    columns = np.argsort(rng.random((R, C)), axis=1)[:, :K]
    ages, alive = rng.integers(0, 50, (R, K)), np.ones((R, K), dtype=bool)
    before, ages_before = columns.copy(), ages.copy()
    for _ in range(decisions):
        ages = ages + 10
        row, slot = int(rng.integers(R - 1)), int(rng.integers(K))  # the last row lives on
        columns[row, slot] = rng.choice(np.setdiff1d(np.arange(C), np.delete(columns[row], slot)))
        ages[row, slot], alive[row, slot] = 0, False
    grid = stats.change_since(before, ages_before, columns, ages, C)
    expected = np.full((R, C), stats.ABSENT)
    np.put_along_axis(expected, before, stats.DIED, axis=1)
    np.put_along_axis(expected, columns, np.where(alive, stats.KEPT, stats.BORN), axis=1)
    np.testing.assert_array_equal(grid, expected)


def test_changes_from_and_to_nothing() -> None:
    none, one = np.full((1, 2), -1), np.array([[1, -1]])
    age = np.zeros((1, 2), dtype=np.int32)
    assert stats.change_since(none, age, one, age, 2).tolist() == [[stats.ABSENT, stats.BORN]]
    assert stats.change_since(one, age, none, age, 2).tolist() == [[stats.ABSENT, stats.DIED]]


def test_the_heatmap_shows_grown_blocks_by_task(task_run: Path) -> None:
    loaded = LoadedRun(task_run)
    info = loaded.run.layers["blocks.0.fc"]
    layer = loaded.snapshot(info.name, 100)
    fig = figures.topology_heatmap(layer, info, colour="task", step=100, spans=loaded.spans)
    blocks = [trace for trace in fig.data if trace.type == "heatmap"][-1]
    nan = np.nan
    np.testing.assert_array_equal(blocks.z, [[nan, 0, nan, nan, 1, 0], [nan, nan, 0, 0, 1, nan]])
    assert blocks.text[0, 4] == "text"
    assert "born in the training on <b>%{text}</b>" in blocks.hovertemplate
    names = [trace.name for trace in fig.data if trace.name]
    assert names == ["sums (4)", "text (2)", "no block"]
    with pytest.raises(ValueError, match=r'colour \(="task"\) needs step and spans'):
        figures.topology_heatmap(layer, info, colour="task")


def test_the_heatmap_compares_with_an_earlier_step(task_run: Path) -> None:
    loaded = LoadedRun(task_run)
    info = loaded.run.layers["blocks.0.fc"]
    layer, first = (loaded.snapshot(info.name, step) for step in (100, 0))
    fig = figures.topology_heatmap(layer, info, colour="since", step=100, since=(0, first))
    names = [trace.name for trace in fig.data if trace.name]
    assert names == ["born (3)", "died (1)", "kept (3)", "no block"]
    title = fig.layout.title.text
    assert "Born, died and kept since step 0, at step 100" in title
    assert "overlap 42.9%, by chance 25.0%" in title  # 3 of 7 positions; 1/3 and 1/2 dense
    table = tables.change_table(layer, first, info)
    died = [i for i, change in enumerate(table["change"]) if change == "died"]
    assert [(table["row"][i], table["column"][i]) for i in died] == [(0, 0)]
    assert np.isnan(table["age_steps"][died[0]])
    with pytest.raises(ValueError, match=r'colour \(="since"\) needs since'):
        figures.topology_heatmap(layer, info, colour="since")


def test_the_table_of_layers_counts_blocks_per_task(task_run: Path) -> None:
    loaded = LoadedRun(task_run)
    table = layer_table(loaded, 100)
    assert table["layer"] == ["blocks.0.fc", "blocks.1.fc"]
    assert table["blocks"] == [6, 6]
    assert table["density"] == [0.5, 0.5]
    assert table["born_in_1_sums"] == [4, 4]
    assert table["born_in_2_text"] == [2, 2]
    assert table["unused_columns"] == [1, 1]
    assert table["mean_swap_rate"] == [0.25, 0.25]  # of the one decision
    assert layer_table(loaded, 25)["swapped"] == [1, 1]
    assert layer_table(loaded, 25)["outside_band"] == [1, 1]  # a quarter, and only there a swap


def test_standstill_is_no_alarm(task_run: Path) -> None:
    """Recorders write snapshots also where the topology stands still on purpose."""
    history = LoadedRun(task_run).history()
    assert history.still.tolist() == [True, False, True, True, True]
    assert history.pooled_outside().tolist() == [False, True, False, False, False]
    rates = history.rates("blocks.0.fc")
    fig = figures.swap_rate(history.steps, rates, still=history.still, spans=SPANS)
    assert "1 of 1 outside the band; none at 3" in fig.layout.title.text
    assert [note.text for note in fig.layout.annotations][-2:] == ["sums begins", "text begins"]


def test_the_first_losses_of_a_task_are_not_spikes() -> None:
    steps, losses = np.arange(8) * 10, np.array([1.0, 1, 1, 1, 8, 8, 20, 8])
    spans = (TaskSpan("a", 0, 30), TaskSpan("b", 30, 80))
    spikes = {
        spans: [60],
        (): [40, 50, 60],
    }
    for known, expected in spikes.items():
        fig = figures.loss(steps, losses, spans=known)
        marked = next(trace for trace in fig.data if str(trace.name).startswith("above"))
        assert marked.x.tolist() == expected
    assert "above" not in figures.loss(steps, losses, alarms=False).layout.title.text
    np.testing.assert_allclose(stats.rolling_mean(losses, 4, [4]), [1, 1, 1, 1, 8, 8, 12, 11])
    np.testing.assert_allclose(stats.rolling_mean(losses, 4, [8])[-1], 11)


def test_names_of_many_tasks_do_not_cover_one_another() -> None:
    def labels(count: int) -> list[str]:
        spans = [TaskSpan(f"permuted-digits:{i}", 10 * i, 10 * i + 10) for i in range(count)]
        fig = figures.swap_rate(np.arange(9) * 10, np.full(9, 0.05), spans=spans)
        notes = fig.layout.annotations[-count:]
        assert notes[-1].hovertext == f"{spans[-1].name} begins at step {spans[-1].start}"
        return [note.text for note in notes]

    assert labels(3)[2] == "permuted-digits:2 begins"
    assert labels(4)[3] == "permuted-digits:3"
    assert labels(8)[7] == "…digits:7"
    assert labels(20)[19] == "20"
