"""Choose a run, then show it."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from blockell_format.snapshots import Problem, RunError

from ..io import LoadedRun, RunChoice, find_runs, is_run, load_run, opens
from ..retention import read_retention, retention_stamp
from ._compare import show_compare
from ._empty import explain_no_run, explain_unreadable
from ._history import show_history
from ._live import redraw_when
from ._overview import show_overview, show_problems
from ._retention import show_retention
from ._sidebar import (
    PAGES,
    choose_layer,
    choose_page,
    choose_run,
    show_about,
    show_config,
    show_live_switch,
)
from ._state import publish
from ._topology import show_layers, show_topology

__all__ = ["show_app"]

# A few blocks. Streamlit would load emoji and named icons from the network.
_ICON = (
    '<svg viewBox="0 0 4 4" shape-rendering="crispEdges"><path fill="#eef0f3" d="M0 0h4v4H0z"/>'
    '<path fill="#0072b2" d="M0 0h1v1H0zM1 1h1v1H1zM2 2h1v1H2zM3 3h1v1H3z"/>'
    '<path fill="#d55e00" d="M2 0h1v1H2zM3 1h1v1H3zM0 2h1v1H0zM1 3h1v1H1z"/></svg>'
)


# Columns that would become too narrow to read go below one another.
_STYLE = """<style>
[data-testid=stMainBlockContainer] {padding: 2.5rem 2.5rem 4rem}
[data-testid=stHorizontalBlock] {flex-wrap: wrap}
[data-testid=stColumn]:has([data-testid=stMetric]) {min-width: 8.5rem}
[data-testid=stColumn]:has([data-testid=stPlotlyChart]) {min-width: min(100%, 23rem)}
.st-key-page button {padding-inline: 0.6rem}
[data-testid=stColumn]:has(.st-key-card-tradeoff, .st-key-card-old-task)
  {min-width: min(100%, 29rem)}
</style>"""


def show_app(directories: Sequence[str]) -> None:
    """Show the dashboard for some run directories, or directories of runs."""
    st.set_page_config(page_title="Block-ELL topology", page_icon=_ICON, layout="wide")
    st.html(_STYLE)
    choices, problems = find_runs(directories)
    if not choices:
        explain_no_run(directories, problems)
        redraw_when(lambda: bool(find_runs(directories)[0]))
        return
    with st.sidebar:
        choice = choose_run(choices)
        page = choose_page(_pages(choice, choices))
    if page == "retention":
        _show_retention(choice, directories, problems)
        publish()
        return
    if page == "compare":
        _show_compare(choice, choices, directories, problems)
        publish()
        return
    try:
        loaded = load_run(choice.path)
    except RunError as error:
        explain_unreadable(choice, str(error))
        redraw_when(lambda: find_runs(directories)[0] != choices or opens(choice.path))
    else:
        loaded.refresh()
        _show_run(choice, loaded, directories, problems)
    publish()


def _pages(choice: RunChoice, choices: Sequence[RunChoice]) -> list[str]:
    """Pages with something to show; a directory that cannot be opened is explained on the first."""
    has_results = retention_stamp(choice.path) is not None
    several = sum(is_run(other.path) for other in choices) > 1
    there = {
        "topology": is_run(choice.path) or not has_results,
        "retention": has_results,
        "compare": several,
    }
    return [page for page in PAGES if there[page]]


def _show_compare(
    choice: RunChoice,
    choices: Sequence[RunChoice],
    directories: Sequence[str],
    problems: list[Problem],
) -> None:
    with st.sidebar:
        interval_s = show_live_switch()
        show_about()
    news, left_out = show_compare([one for one in choices if is_run(one.path)], choice.label)
    show_problems([*problems, *left_out])
    if interval_s is not None:
        redraw_when(lambda: news() or len(find_runs(directories)[0]) != len(choices), interval_s)


def _show_retention(choice: RunChoice, directories: Sequence[str], problems: list[Problem]) -> None:
    with st.sidebar:
        interval_s = show_live_switch()
        show_about()
    stamp, runs = retention_stamp(choice.path), find_runs(directories)[0]
    results = read_retention(choice.path)
    show_retention(choice, results)
    show_problems([*problems, *results.problems])
    if interval_s is not None:
        redraw_when(
            lambda: (
                retention_stamp(choice.path) != stamp or len(find_runs(directories)[0]) != len(runs)
            ),
            interval_s,
        )


def _show_run(
    choice: RunChoice, loaded: LoadedRun, directories: Sequence[str], problems: list[Problem]
) -> None:
    layers = loaded.run.layers
    with st.sidebar:
        layer = choose_layer(layers) if layers else None
        interval_s = show_live_switch()
        show_config(loaded.run)
        show_about()
    # Read before anything is drawn, so that the overview counts the problems of this layer too.
    with st.spinner("Reading snapshots", show_time=True):
        loaded.history()
        if layer is not None:
            loaded.series(layer.name)
    show_overview(choice, loaded, directories, interval_s)
    step = None
    if layer is not None:
        step = show_topology(choice, loaded, layer)
    else:
        st.info(
            "This run has no block-sparse layer: its model is dense. There is no topology to show, "
            "only its metrics.",
            icon=":material/grid_off:",
        )
    show_history(choice, loaded, layer, step)
    if step is not None and len(layers) > 1:
        show_layers(choice, loaded, step)
    show_problems([*problems, *loaded.run.problems])
