"""The heatmap of one layer at one step, with the slider over the recorded steps."""

from __future__ import annotations

import streamlit as st

from blockell_format.snapshots import LayerInfo, LayerSnapshot

from .. import figures, stats
from ..io import LoadedRun, RunChoice
from ..layers import layer_label
from ..tables import age_table, topology_table
from ._chart import chart_card, page_theme
from ._state import choose, choose_step, move_step
from ._text import escape

__all__ = ["show_topology"]

_COLOUR_LABELS = {"age": "Age", "score": "Score", "change": "Born, died, kept"}


def show_topology(choice: RunChoice, loaded: LoadedRun, info: LayerInfo) -> int | None:
    """Show the layer at the step the reader picks; returns that step."""
    steps = loaded.run.steps
    st.subheader(escape(layer_label(info.name)), anchor=False, help=f"Module {escape(info.name)}")
    if not steps:
        st.info(
            "No topology decision is recorded yet. The heatmap appears with the first snapshot.",
            icon=":material/hourglass_empty:",
        )
        return None
    step, colour = _controls(steps)
    try:
        layer = loaded.snapshot(info.name, step)
    except ValueError as error:
        st.warning(f"This layer cannot be shown at step {step:,}.\n\n{escape(str(error))}")
        return step
    left, right = st.columns([5, 3])
    with left:
        _heatmap_card(choice, loaded, info, layer, step, colour)
    with right:
        _age_card(choice, loaded, info, layer, step)
    return step


def _controls(steps: list[int]) -> tuple[int, figures.Colour]:
    step = choose_step(steps)
    position = steps.index(step)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            on_click=move_step,
            args=(steps, -1),
            disabled=position == 0,
            key="previous",
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            icon_position="right",
            on_click=move_step,
            args=(steps, 1),
            disabled=position == len(steps) - 1,
            key="next",
        )
        if len(steps) > 1:
            st.select_slider(
                f"Step (snapshot {position + 1:,} of {len(steps):,})",
                steps,
                format_func=lambda value: f"{value:,}",
                key="step",
                width="stretch",
            )
        else:
            st.markdown(f"Step {step:,}, the only snapshot so far")
        choose("colour", figures.COLOURS, figures.COLOURS[0])
        picked = st.segmented_control(
            "Colour by",
            figures.COLOURS,
            format_func=lambda value: _COLOUR_LABELS[value],
            required=True,
            key="colour",
        )
    return step, picked or figures.COLOURS[0]


def _heatmap_card(
    choice: RunChoice,
    loaded: LoadedRun,
    info: LayerInfo,
    layer: LayerSnapshot,
    step: int,
    colour: figures.Colour,
) -> None:
    series = loaded.series(info.name)
    ranges = {"age": (0.0, series.age_limit), "score": series.score_range}
    fig = figures.topology_heatmap(
        layer,
        info,
        colour=colour,
        value_range=ranges.get(colour),
        step=step,
        theme=page_theme(),
    )
    live = int((layer.col_indices >= 0).sum())
    chart_card(
        fig,
        lambda: topology_table(layer, info),
        key="topology",
        name=(choice.label, info.name, f"step-{step}"),
        alt=(
            f"Heatmap of {info.R} by {info.C} block positions of layer {info.name} at step {step}, "
            f"coloured by {colour}: {live} blocks, {int(layer.swapped.sum())} of them new."
        ),
    )


def _age_card(
    choice: RunChoice, loaded: LoadedRun, info: LayerInfo, layer: LayerSnapshot, step: int
) -> None:
    ages = layer.block_age_steps[layer.col_indices >= 0]
    upper = loaded.series(info.name).age_limit
    summary = stats.age_summary(ages)
    chart_card(
        figures.age_histogram(ages, upper=upper, step=step, theme=page_theme()),
        lambda: age_table(ages, upper),
        key="ages",
        name=(choice.label, info.name, f"step-{step}"),
        alt=(
            f"Histogram of block ages at step {step}: median {summary.median:.0f} steps, "
            f"90th percentile {summary.p90:.0f} steps."
        ),
    )
