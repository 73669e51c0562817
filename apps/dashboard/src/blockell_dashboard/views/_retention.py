"""The retention page: what is left of old tasks, per method, and what the new one costs."""

from __future__ import annotations

import streamlit as st

from .. import figures
from .. import retention_tables as tables
from ..io import RunChoice
from ..retention import RECORDS_FILE, Retention
from ..retention_stats import Group, group_cells
from ._chart import chart_card, page_theme, table_card
from ._state import choose
from ._text import escape

__all__ = ["show_retention"]

_MATRIX_LABELS = {"score": "Score", "change": "Forgetting"}


def show_retention(choice: RunChoice, results: Retention) -> None:
    """Show the finished cells of a retention experiment."""
    st.header(escape(choice.label), anchor=False)
    if not results.cells:
        st.info(
            f"No cell in {RECORDS_FILE} can be shown yet. Each appears as soon as it is finished.",
            icon=":material/hourglass_empty:",
        )
        return
    setting = _choose_setting(results)
    groups = group_cells(results.of(setting))
    cell = groups[0].cells[0]
    count = sum(len(group.cells) for group in groups)
    order = ", then ".join(
        f"{escape(name)} ({steps:,} steps)"
        for name, steps in zip(cell.tasks, cell.steps, strict=True)
    )
    st.markdown(f"{count:,} finished trainings of {len(groups)} methods and dials: {order}.")
    _method_table(choice, groups)
    _comparison(choice, groups)
    _one_method(choice, groups)


def _choose_setting(results: Retention) -> str:
    settings = results.settings
    choose("setting", settings, settings[-1])
    if len(settings) == 1:
        return settings[0]
    return st.selectbox(
        "Experiment", settings, key="setting", width=420, help="Model, tasks and steps agree"
    )


def _method_table(choice: RunChoice, groups: list[Group]) -> None:
    st.subheader("Methods", anchor=False)
    table_card(
        tables.method_table(groups),
        key="methods",
        name=(choice.label,),
        data=lambda: tables.statistics_table(groups),
    )
    tasks = groups[0].cells[0].tasks
    first = escape(tasks[0])
    several = "Of all old tasks: its mean over all but the last. " if len(tasks) > 2 else ""
    st.caption(
        "Mean ± standard deviation \\[lowest to highest\\] over seeds, on test data; one number "
        "where all seeds agree to the digits shown. Relative "
        f"forgetting of {first}: 0% is nothing lost, 100% everything down to chance. {several}"
        f"Lowest: the worst {first} at any time after it was learned. Block overlap: blocks that "
        "both tasks use, and the same with the second task's blocks shuffled within their rows."
    )
    void = [group.label for group in groups if group.void]
    if void:
        st.warning(
            f"{first} was not learned well enough to be forgotten in some seeds of "
            f"{escape(', '.join(void))}: their comparison is void."
        )


def _comparison(choice: RunChoice, groups: list[Group]) -> None:
    tasks = groups[0].cells[0].tasks
    task = 0
    if len(tasks) > 2:
        names = list(dict.fromkeys(tasks[:-1]))
        choose("task", names, names[0])
        task = tasks.index(
            st.segmented_control("What is left of", names, required=True, key="task") or names[0]
        )
    left, right = st.columns(2)
    theme, height = page_theme(), 460 + 18 * (len(groups) // 3)  # the legend takes lines
    with left:
        chart_card(
            figures.retention_tradeoff(groups, theme=theme, height=height),
            lambda: tables.cell_table(groups),
            key="tradeoff",
            name=(choice.label,),
            alt="How much of the old task each method keeps, against the new task's loss.",
        )
    with right:
        chart_card(
            figures.old_task_over_steps(groups, task=task, theme=theme, height=height),
            lambda: tables.lines_table(groups, task),
            key="old-task",
            name=(choice.label, tasks[task]),
            alt=f"Task {tasks[task]} over the steps of the later trainings, a line per method.",
        )


def _one_method(choice: RunChoice, groups: list[Group]) -> None:
    st.subheader("One method", anchor=False)
    by_label = {group.label: group for group in groups}
    labels = list(by_label)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        choose("method", labels, labels[0])
        group = by_label[st.selectbox("Method and dial", labels, key="method", width=420)]
        choose("matrix", figures.MATRIX_KINDS, figures.MATRIX_KINDS[0])
        kind = st.segmented_control(
            "Matrix",
            figures.MATRIX_KINDS,
            format_func=lambda value: _MATRIX_LABELS[value],
            required=True,
            key="matrix",
        )
    left, right = st.columns([5, 4])
    with left:
        chart_card(
            figures.task_scores(group, theme=page_theme()),
            lambda: tables.lines_table([group]),
            key="tasks",
            name=(choice.label, group.label),
            alt=f"Score of every task over the steps of all trainings with {group.label}.",
        )
    with right:
        chart_card(
            figures.retention_matrix(
                group, kind=kind or figures.MATRIX_KINDS[0], theme=page_theme()
            ),
            lambda: tables.matrix_table(group),
            key="matrix",
            name=(choice.label, group.label),
            alt=f"Every task's score after every training with {group.label}.",
        )
    own = tables.own_table(group)
    if len(own["figure"]):
        st.markdown("Figures of the method's own, after the last task, over seeds:")
        number = st.column_config.NumberColumn(format="%.4g")
        table_card(
            own,
            key="own",
            name=(choice.label, group.label),
            columns=dict.fromkeys(("mean", "sd", "min", "max"), number),
        )
