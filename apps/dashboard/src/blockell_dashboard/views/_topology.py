"""The heatmap of one layer at one step, with the slider over the recorded steps."""

from __future__ import annotations

import numpy as np
import streamlit as st

from blockell_format.snapshots import LayerInfo, LayerSnapshot

from .. import figures, stats
from ..io import LoadedRun, RunChoice
from ..layer_table import layer_table
from ..layers import layer_label
from ..tables import Table, age_table, change_table, topology_table
from ._chart import chart_card, page_theme, table_card
from ._state import choose, choose_earlier, choose_step, move_step
from ._text import escape

__all__ = ["show_layers", "show_topology"]

_COLOUR_LABELS = {
    "age": "Age",
    "score": "Score",
    "change": "Born, died, kept",
    "since": "Since a step",
    "task": "Task of birth",
}


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
    step, colour, earlier = _controls(steps, has_tasks=bool(loaded.spans))
    if colour == "change" and _has_grown(loaded, info, step):
        colour, earlier = "since", steps[steps.index(step) - 1]
    try:
        layer = loaded.snapshot(info.name, step)
        since = None if earlier is None else (earlier, loaded.snapshot(info.name, earlier))
    except ValueError as error:
        st.warning(f"This layer cannot be shown at step {step:,}.\n\n{escape(str(error))}")
        return step
    left, right = st.columns([5, 3])
    with left:
        _heatmap_card(choice, loaded, info, layer, step, colour, since)
    with right:
        _age_card(choice, loaded, info, layer, step)
    return step


def _has_grown(loaded: LoadedRun, info: LayerInfo, step: int) -> bool:
    """Whether the layer got more blocks after the snapshot before: no decision recorded these."""
    history = loaded.history()
    at = int(np.searchsorted(history.steps, step))
    blocks = history.blocks[:, history.names.index(info.name)]
    return at > 0 and bool(blocks[at] != blocks[at - 1])


def show_layers(choice: RunChoice, loaded: LoadedRun, step: int) -> None:
    """Show a table of all layers at the selected step."""
    st.subheader(f"All layers at step {step:,}", anchor=False)
    table = layer_table(loaded, step)
    percent = st.column_config.NumberColumn(format="percent")
    number = st.column_config.NumberColumn(format="%.4f")
    table_card(
        table,
        key="layers",
        name=(choice.label, f"step-{step}"),
        columns={
            "density": percent,
            "swap_rate": percent,
            "mean_swap_rate": percent,
            "column_entropy": number,
        },
    )
    text = (
        "The mean swap rate per decision and the decisions outside the band of 1 to 10% are of the "
        "whole run, all else of this step."
    )
    if loaded.spans:
        text += " Born in: live blocks by the training in which they were born or grown."
    st.caption(text)


def _controls(steps: list[int], *, has_tasks: bool) -> tuple[int, figures.Colour, int | None]:
    """The selected step, the colour, and the earlier step to compare with where asked for."""
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
        colours = [colour for colour in figures.COLOURS if has_tasks or colour != "task"]
        choose("colour", colours, colours[0])
        picked = st.segmented_control(
            "Colour by",
            colours,
            format_func=lambda value: _COLOUR_LABELS[value],
            required=True,
            key="colour",
        )
        earlier = None
        if picked == "since":
            choices = steps[: position + 1]
            choose_earlier(choices)
            earlier = st.selectbox(
                "Since step",
                choices,
                format_func=lambda value: f"{value:,}",
                key="since",
                width=140,
                help="Compare with this earlier snapshot",
            )
    return step, picked or colours[0], earlier


def _heatmap_card(
    choice: RunChoice,
    loaded: LoadedRun,
    info: LayerInfo,
    layer: LayerSnapshot,
    step: int,
    colour: figures.Colour,
    since: tuple[int, LayerSnapshot] | None,
) -> None:
    series = loaded.series(info.name)
    ranges = {"age": (0.0, series.age_scale), "score": series.score_range}
    fig = figures.topology_heatmap(
        layer,
        info,
        colour=colour,
        value_range=ranges.get(colour),
        step=step,
        since=since,
        spans=loaded.spans,
        theme=page_theme(),
    )
    live = int((layer.col_indices >= 0).sum())

    def table() -> Table:
        if since is not None:
            return change_table(layer, since[1], info)
        return topology_table(layer, info, step=step, spans=loaded.spans)

    chart_card(
        fig,
        table,
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
