"""The page that puts several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import streamlit as st

from blockell_format.snapshots import Problem, RunError

from .. import compare, figures, stats
from ..io import LoadedRun, RunChoice, load_run, opens
from ._chart import chart_card, page_theme, table_card
from ._state import choose, choose_several

__all__ = ["MAX_RUNS", "show_compare"]

MAX_RUNS = 12
_AT_FIRST = 4


def show_compare(
    choices: Sequence[RunChoice], chosen: str
) -> tuple[Callable[[], bool], list[Problem]]:
    """Show some of these runs in common charts, at first `chosen` and the newest ones.

    Returns:
        a function that reads what is new and says whether anything was, and the runs left out.
    """
    st.header("Compare runs", anchor=False)
    by_label = {choice.label: choice for choice in choices}
    first = sorted(by_label.values(), key=lambda choice: choice.label != chosen)
    good = (choice.label for choice in first if opens(choice.path))
    choose_several("runs", list(by_label), list(islice(good, _AT_FIRST)))
    picked = st.multiselect(
        "Runs",
        list(by_label),
        key="runs",
        max_selections=MAX_RUNS,
        placeholder="Choose runs",
        help="Newest first. Steps are each run's own.",
    )
    runs: dict[str, LoadedRun] = {}
    problems: list[Problem] = []
    for label in picked:
        try:
            runs[label] = load_run(by_label[label].path)
            runs[label].refresh()
        except RunError as error:
            problems.append(Problem(by_label[label].path, str(error)))
    if runs:
        _show(runs)
    else:
        st.info("Choose one or more runs to compare.", icon=":material/stacked_line_chart:")
    versions = {label: loaded.version for label, loaded in runs.items()}
    return lambda: any(
        runs[label].refresh() != known for label, known in versions.items()
    ), problems


def _show(runs: dict[str, LoadedRun]) -> None:
    names = compare.common_metrics(list(runs.values()))
    metric = None
    if names:
        choose("metric", names, names[0])
        metric = st.selectbox("Metric", names, key="metric", width=420)
    percent = st.column_config.NumberColumn(format="percent")
    table_card(
        compare.run_table(runs, metric),
        key="runs",
        name=("compare",),
        columns={"density": percent, "mean_swap_rate": percent},
    )
    left, right = st.columns(2)
    with left:
        if metric is not None:
            _metric_card(runs, metric)
        else:
            st.caption("None of these runs logged a metric.")
    with right:
        _swap_card(runs)
    _settings(runs)


def _metric_card(runs: dict[str, LoadedRun], metric: str) -> None:
    series = [(name, *loaded.metrics().get(metric)) for name, loaded in runs.items()]
    series = [line for line in series if len(line[1])]
    chart_card(
        figures.compare_runs(
            series,
            title=metric,
            y_title=metric,
            spans={name: loaded.spans for name, loaded in runs.items()},
            order=list(runs),
            theme=page_theme(),
        ),
        lambda: compare.series_table(series, metric),
        key="compare-metric",
        name=("compare", metric),
        alt=f"Metric {metric} of {len(series)} runs over steps.",
    )


def _swap_card(runs: dict[str, LoadedRun]) -> None:
    series = []
    for name, loaded in runs.items():
        rates = loaded.history().pooled_rates()
        if np.isfinite(rates).any():
            series.append((name, loaded.history().steps, rates))
    if not series:
        st.caption("None of these runs recorded a topology decision.")
        return
    chart_card(
        figures.compare_runs(
            series,
            title="Swap rate, all layers",
            y_title="blocks replaced per decision",
            window=10,
            share=True,
            band=stats.HEALTHY_SWAP_RATE,
            spans={name: loaded.spans for name, loaded in runs.items()},
            order=list(runs),
            theme=page_theme(),
        ),
        lambda: compare.series_table(series, "swap_rate"),
        key="compare-swaps",
        name=("compare",),
        alt=f"Swap rate of all layers together of {len(series)} runs over steps.",
    )


def _settings(runs: dict[str, LoadedRun]) -> None:
    if len(runs) < 2:
        return
    table = compare.config_differences({name: loaded.run.config for name, loaded in runs.items()})
    st.subheader("Settings that differ", anchor=False)
    if len(table["setting"]):
        table_card(table, key="settings", name=("compare",))
    else:
        st.caption("The recorded configurations of these runs are the same.")
