"""Charts of retention experiments hold the numbers they were given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from blockell_dashboard import figures
from blockell_dashboard import retention_stats as numbers
from blockell_dashboard.retention import read_retention
from blockell_dashboard.retention_stats import Group

DIRECTORY = Path(__file__).parent / "data"


@pytest.fixture
def groups() -> list[Group]:
    """Ours and fine-tuning, three seeds each."""
    return numbers.group_cells(read_retention(DIRECTORY).cells)


def test_every_task_is_drawn_with_its_seeds_and_boundaries(groups: list[Group]) -> None:
    fig = figures.task_scores(groups[0])
    shown = [trace for trace in fig.data if trace.showlegend]
    assert [trace.name for trace in shown] == ["arithmetic", "tinyshakespeare"]
    assert len(fig.data) == 2 * (3 + 1)
    lines = [numbers.task_lines(cell)[0] for cell in groups[0].cells]
    np.testing.assert_array_equal(shown[0].x, lines[0].steps)
    np.testing.assert_allclose(shown[0].y, np.mean([line.scores for line in lines], axis=0))
    assert [shape.x0 for shape in fig.layout.shapes] == [0, 1500]
    assert [note.text for note in fig.layout.annotations] == [
        "arithmetic begins",
        "tinyshakespeare begins",
    ]
    assert "3 seeds" in fig.layout.title.text


def test_seeds_measured_at_different_steps_are_not_averaged(groups: list[Group]) -> None:
    one, two = groups[0].cells[:2]
    other = dataclasses.replace(two, path=(two.path[0][:3],))
    fig = figures.old_task_over_steps([dataclasses.replace(groups[0], cells=(one, other))])
    assert [len(trace.x) for trace in fig.data] == [9, 5]
    assert [trace.showlegend for trace in fig.data] == [True, False]


def test_the_old_task_begins_where_it_was_learned(groups: list[Group]) -> None:
    fig = figures.old_task_over_steps(groups)
    shown = [trace for trace in fig.data if trace.showlegend]
    assert [trace.name for trace in shown] == [group.label for group in groups]
    assert all(min(trace.x) == 1500 and max(trace.x) == 4500 for trace in fig.data)
    assert shown[0].y[-1] > 0.95 > 0.0 > shown[1].y[-1]
    assert len({(trace.line.color, trace.marker.symbol) for trace in shown}) == 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_matrix_states_scores_and_forgetting(groups: list[Group], theme: str) -> None:
    fig = figures.retention_matrix(groups[1], theme=theme)
    (heatmap,) = fig.data
    expected = np.mean([numbers.score_matrix(cell) for cell in groups[1].cells], axis=0)
    np.testing.assert_allclose(heatmap.z, expected)
    assert (heatmap.zmin, heatmap.zmax) == (0.0, 1.0)
    assert [note.text for note in fig.layout.annotations][2] == "100.0%"
    assert fig.layout.yaxis.ticktext[0] == "untrained"

    fig = figures.retention_matrix(groups[1], kind="change", theme=theme)
    np.testing.assert_allclose(fig.data[0].z[2], [-1.0101010, 0.0], atol=1e-6)
    assert np.isnan(fig.data[0].z[:2]).tolist() == [[True, True], [False, True]]
    assert [note.text for note in fig.layout.annotations] == ["0.0%", "-101.0%", "0.0%"]


def test_an_unknown_matrix_is_refused(groups: list[Group]) -> None:
    with pytest.raises(ValueError, match=r"kind \(='smell'\) must be one of score, change"):
        figures.retention_matrix(groups[0], kind="smell")  # type: ignore[arg-type]


def test_the_tradeoff_joins_the_dials_of_a_method_and_shows_every_seed(
    groups: list[Group],
) -> None:
    weaker = [
        dataclasses.replace(cell, dial=1e-4, nats=cell.nats + 0.2, matrix=cell.matrix * 1.0)
        for cell in groups[1].cells
    ]
    every = [cell for group in groups for cell in group.cells]
    fig = figures.retention_tradeoff(numbers.group_cells([*every, *weaker]))
    points = {trace.name: trace for trace in fig.data if trace.mode == "markers"}
    assert {name: len(trace.x) for name, trace in points.items()} == {
        "ours · sparse": 3,
        "fine-tuning · sparse": 6,
    }
    np.testing.assert_allclose(points["ours · sparse"].y, [numbers.kept(c) for c in every[:3]])
    (line,) = [trace for trace in fig.data if trace.mode == "lines"]
    mean = np.mean([numbers.new_nats(cell) for cell in groups[1].cells])
    np.testing.assert_allclose(line.x, [mean + 0.2, mean])  # dials ascend


def test_losses_far_off_do_not_squeeze_the_others(groups: list[Group]) -> None:
    every = [cell for group in groups for cell in group.cells]
    fig = figures.retention_tradeoff(groups)
    assert fig.layout.xaxis.range is None
    assert fig.layout.xaxis.title.text.endswith(", nats")
    stuck = [
        dataclasses.replace(cell, method="l2", dial=1e3, nats=cell.nats + 17.0)
        for cell in groups[1].cells
    ]
    fig = figures.retention_tradeoff(numbers.group_cells([*every, *stuck]))
    losses = [numbers.new_nats(cell) for cell in every]
    left, right = fig.layout.xaxis.range
    assert left < min(losses) <= max(losses) < right < max(losses) + 0.5
    assert f"nats ({len(stuck)} beyond {right:.1f}: zoom out)" in fig.layout.xaxis.title.text
    assert sum(len(t.x) for t in fig.data if t.mode == "markers") == len(every) + len(stuck)


def test_many_methods_differ_in_more_than_colour(groups: list[Group]) -> None:
    many = [dataclasses.replace(groups[0], method=f"m{i}") for i in range(20)]
    fig = figures.old_task_over_steps(many)
    shown = [trace for trace in fig.data if trace.showlegend]
    styles = {(t.line.color, t.marker.symbol, t.line.dash) for t in shown}
    assert len(styles) == 20


def test_names_from_files_are_not_taken_for_markup(groups: list[Group]) -> None:
    cells = tuple(
        dataclasses.replace(cell, tasks=("<b>x</b>", "y"), method="<i>m</i>")
        for cell in groups[0].cells
    )
    odd = dataclasses.replace(groups[0], method="<i>m</i>", cells=cells)
    for fig in (
        figures.task_scores(odd),
        figures.retention_matrix(odd),
        figures.retention_tradeoff([odd]),
        figures.old_task_over_steps([odd]),
    ):
        page = str(fig.to_dict())
        assert "<i>m" not in page
        assert "<b>x" not in page


def test_shares_kept_of_a_task_hardly_learned_do_not_squeeze_the_others(
    groups: list[Group],
) -> None:
    cell = groups[0].cells[0]
    matrix = cell.matrix.copy()
    matrix[1, 0] = cell.chance[0] + 0.001
    wild = dataclasses.replace(
        groups[0], cells=(*groups[0].cells, dataclasses.replace(cell, matrix=matrix))
    )
    fig = figures.retention_tradeoff([wild])
    assert fig.layout.yaxis.range == (-0.1, 1.25)
    assert fig.layout.yaxis.title.text == "old task kept (1 outside: zoom out)"
    same = dataclasses.replace(groups[0], cells=(cell,))
    low, high = figures.retention_tradeoff([same]).layout.yaxis.range
    assert low < numbers.kept(cell) < high < low + 0.1
    assert groups[0].cells[0].matrix[1, 0] > 0.9


def test_no_minus_before_nothing(groups: list[Group]) -> None:
    cell = dataclasses.replace(
        groups[0].cells[0], matrix=groups[0].cells[0].chance - 1e-4 * np.ones((3, 2))
    )
    fig = figures.retention_matrix(dataclasses.replace(groups[0], cells=(cell,)))
    assert {note.text for note in fig.layout.annotations} == {"0.0%"}
