"""Figures hold the numbers they were given; none of them needs Streamlit."""

from __future__ import annotations

import dataclasses

import numpy as np
import plotly.graph_objects as go
import pytest

from blockell_dashboard import figures
from blockell_dashboard.figures._theme import step_axis
from blockell_format.snapshots import LayerInfo, LayerSnapshot

INFO = LayerInfo("fc", R=3, C=4, K=3, B=16)


def heatmaps(fig: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in fig.data if trace.type == "heatmap"]


def test_heatmap_shows_ages_and_leaves_absent_cells_to_the_neutral_colour(
    small_layer: LayerSnapshot,
) -> None:
    fig = figures.topology_heatmap(small_layer, INFO, colour="age", step=30)
    absent, blocks = heatmaps(fig)
    nan = np.nan
    np.testing.assert_array_equal(
        blocks.z, [[30, 0, nan, nan], [nan, nan, 10, 20], [30, 30, nan, nan]]
    )
    np.testing.assert_array_equal(np.isnan(absent.z), ~np.isnan(blocks.z))
    assert {colour for _, colour in absent.colorscale} == {figures.palette("light").absent}
    assert "step 30" in fig.layout.title.text
    assert "2 per row (50% dense)" in fig.layout.title.text


def test_heatmap_says_what_its_scale_of_ages_leaves_out(small_layer: LayerSnapshot) -> None:
    fig = figures.topology_heatmap(small_layer, INFO, value_range=(0.0, 15.0))
    assert "; 4 blocks older than the scale" in fig.layout.title.text
    fig = figures.topology_heatmap(small_layer, INFO, value_range=(0.0, 30.0))
    assert "older" not in fig.layout.title.text


def test_heatmap_hover_names_weights_age_and_score(small_layer: LayerSnapshot) -> None:
    blocks = heatmaps(figures.topology_heatmap(small_layer, INFO))[-1]
    assert blocks.customdata[1, 2].tolist() == [10, 2, 16, 32, 32, 48]
    for part in ("row %{y", "column %{x", "weight[", "age", "score"):
        assert part in blocks.hovertemplate


def test_scores_that_are_not_finite_are_not_taken_for_absent(small_layer: LayerSnapshot) -> None:
    absent, odd, blocks = heatmaps(figures.topology_heatmap(small_layer, INFO, colour="score"))
    assert np.isnan(blocks.z[1, 3])
    assert odd.z[1, 3] == 0
    assert np.isnan(absent.z[1, 3])
    assert "not a finite number" in odd.hovertemplate


def test_heatmap_of_changes(small_layer: LayerSnapshot) -> None:
    fig = figures.topology_heatmap(small_layer, INFO, colour="change")
    absent, died, blocks = heatmaps(fig)
    assert blocks.z[0, 1] == 1
    assert blocks.z[0, 0] == 0
    assert np.argwhere(~np.isnan(died.z)).tolist() == [[0, 3]]
    assert int((~np.isnan(absent.z)).sum()) == 5
    names = [trace.name for trace in fig.data if trace.name]
    assert names == ["born (1)", "died (1)", "kept (5)", "no block"]
    symbols = [trace.marker.symbol for trace in fig.data if trace.type == "scatter"][:2]
    assert symbols == ["cross-thin", "x-thin"]  # colour does not carry the meaning alone


def test_the_colour_scale_stays_where_it_is_put(small_layer: LayerSnapshot) -> None:
    fig = figures.topology_heatmap(small_layer, INFO, value_range=(0, 500))
    assert (fig.data[-1].zmin, fig.data[-1].zmax) == (0, 500)


def test_scores_that_are_not_finite_are_counted(small_layer: LayerSnapshot) -> None:
    for value, said in ((1.0, ""), (np.nan, "; 2 scores not finite, in pink")):
        score = np.nan_to_num(small_layer.block_score)
        score[0, 0] = score[1, 1] = value
        layer = dataclasses.replace(small_layer, block_score=score)
        title = figures.topology_heatmap(layer, INFO, colour="score").layout.title.text
        assert title.partition(" dense)")[2].partition("</span>")[0] == said
        assert "not finite" not in figures.topology_heatmap(layer, INFO).layout.title.text


def test_large_grids_are_aggregated() -> None:
    R, C, K = 1030, 640, 8
    rng = np.random.default_rng(0)
    columns = np.argsort(rng.random((R, C)), axis=1)[:, :K].astype(np.int32)
    layer = LayerSnapshot(
        columns,
        np.full((R, K), 7, dtype=np.int32),
        np.ones((R, K), dtype=np.float32),
        np.zeros((R, K), dtype=bool),
        columns,
    )
    fig = figures.topology_heatmap(layer, LayerInfo("big", R=R, C=C, K=K, B=16))
    blocks = heatmaps(fig)[-1]
    assert blocks.z.shape == (344, 320)
    assert set(np.unique(blocks.z[~np.isnan(blocks.z)])) == {7}
    assert "weight[16*%{y:d} + 0:48, 16*%{x:d} + 0:32]" in blocks.hovertemplate
    assert (blocks.dy, blocks.dx) == (3, 2)
    assert "one cell sums up 3 × 2 blocks" in fig.layout.title.text  # noqa: RUF001


def test_the_last_tile_ends_with_the_weight(small_layer: LayerSnapshot) -> None:
    fig = figures.topology_heatmap(small_layer, INFO, max_cells_per_side=2)
    blocks = heatmaps(fig)[-1]
    assert blocks.z.shape == (2, 2)
    assert blocks.customdata[1, 1, 2:].tolist() == [32, 48, 32, 64]
    assert blocks.customdata[0, 0, 0] == pytest.approx(15)  # the mean of 30 and 0
    assert "mean age" in blocks.hovertemplate


def test_unknown_choices_are_refused(small_layer: LayerSnapshot) -> None:
    with pytest.raises(ValueError, match=r"colour \(='size'\) must be one of age, score, change"):
        figures.topology_heatmap(small_layer, INFO, colour="size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"theme \(='pink'\) must be one of light, dark"):
        figures.topology_heatmap(small_layer, INFO, theme="pink")  # type: ignore[arg-type]


def test_age_histogram_counts_blocks() -> None:
    fig = figures.age_histogram(np.array([0, 0, 5, 9]), upper=9, step=12)
    assert sum(fig.data[0].y) == 4
    assert "4 blocks; median 2" in fig.layout.title.text
    assert fig.layout.yaxis.dtick == 1, "no halves of blocks"
    assert all(note.yanchor == "bottom" for note in fig.layout.annotations), "above the bars"
    assert "1 block;" in figures.age_histogram(np.array([3])).layout.title.text
    assert figures.age_histogram(np.empty(0, dtype=np.int32)).layout.title.text.count("no blocks")


def test_swap_rate_marks_outliers_and_draws_the_band() -> None:
    steps = np.arange(20) * 10
    rates = np.full(20, 0.05)
    rates[7], rates[11] = 0.3, 0.001
    fig = figures.swap_rate(steps, rates, all_steps=steps, all_rates=rates, selected_step=70)
    marked = next(trace for trace in fig.data if trace.name == "outside the band")
    assert marked.x.tolist() == [70, 110]
    band = fig.layout.shapes[0]
    assert (band.y0, band.y1) == (0.01, 0.10)
    assert "2 of 20 outside the band" in fig.layout.title.text
    assert fig.layout.yaxis.range[1] > 0.3


def test_column_entropy_keeps_the_scale_honest() -> None:
    steps = np.arange(5)
    fig = figures.column_entropy(steps, np.full(5, 0.991), np.zeros(5), C=8)
    assert fig.layout.yaxis.range[0] == pytest.approx(0.9)
    low = figures.column_entropy(steps, np.full(5, 0.33), np.full(5, 3), C=8)
    assert low.layout.yaxis.range[0] == pytest.approx(0.3)
    assert "unused now: 3 of 8" in low.layout.title.text


def test_loss_marks_spikes_and_decisions() -> None:
    steps = np.arange(100)
    losses = np.ones(100)
    losses[50], losses[60] = 5.0, np.nan
    fig = figures.loss(steps, losses, decision_steps=np.array([10, 20]))
    named = {trace.name: trace for trace in fig.data}
    spikes = next(trace for name, trace in named.items() if name.startswith("above"))
    assert spikes.x.tolist() == [50]
    broken = named["not finite"]
    assert (broken.x.tolist(), broken.y.tolist()) == ([60], [5.0])
    assert broken.marker.symbol != spikes.marker.symbol
    assert "100 values; 1 above 2" in fig.layout.title.text
    assert "; 1 not finite" in fig.layout.title.text
    assert named["topology decision"].x.tolist() == [10, 20]
    many = figures.loss(steps, losses, decision_steps=np.arange(1000)).data[-1]
    assert many.name == "topology decision (1 of 7 drawn)"
    assert len(many.x) == 143


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_empty_series_draw(theme: figures.Theme) -> None:
    none = np.empty(0)
    for fig in (
        figures.swap_rate(none, none, theme=theme),
        figures.column_entropy(none, none, none, C=4, theme=theme),
        figures.loss(none, none, theme=theme),
        figures.loss(np.array([1]), np.array([np.nan]), theme=theme),
        figures.swap_rate(np.array([0]), np.array([np.nan]), theme=theme),
    ):
        assert fig.layout.paper_bgcolor == figures.palette(theme).background
        fig.to_json()


def test_long_series_are_bucketed_without_losing_the_spike() -> None:
    steps = np.arange(100_000)
    losses = np.ones(100_000)
    losses[77_777] = 50
    fig = figures.loss(steps, losses)
    assert len(fig.data[0].x) < 5000
    assert 50 in fig.data[0].y


def test_text_from_files_is_not_taken_for_markup() -> None:
    name = "<b>loss</b>"
    fig = figures.loss(np.array([1, 2]), np.array([1.0, 2.0]), name=name)
    assert "&lt;b&gt;loss" in fig.layout.title.text


def test_series_colours_differ_in_lightness_or_hue_for_everybody() -> None:
    for theme in ("light", "dark"):
        colours = dataclasses.asdict(figures.palette(theme))
        series = {colours[name] for name in ("first", "second", "third", "kept")}
        assert len(series) == 4


@pytest.mark.parametrize(("steps", "tick"), [([0], 1), ([0, 2], 1), ([3, 9], 1), ([0, 9], None)])
def test_axes_of_few_steps_name_no_halves(steps: list[int], tick: int | None) -> None:
    axis = step_axis(steps)
    assert axis.get("dtick") == tick
    assert axis["range"][0] < steps[0]
    assert axis["range"][1] > steps[-1]
