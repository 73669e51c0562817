"""A chart in its card, with the download of its data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from ..figures import Theme
from ..tables import Table, file_name, to_csv

__all__ = ["chart_card", "page_theme", "table_card"]

_MODEBAR = ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"]


def page_theme() -> Theme:
    """The theme of the reader's page; light while it is unknown."""
    return "dark" if st.context.theme.type == "dark" else "light"


def chart_card(
    fig: go.Figure, table: Callable[[], Table], *, key: str, name: tuple[str | int, ...], alt: str
) -> None:
    """Show a figure and a button that downloads its data.

    Args:
        fig: the figure.
        table: makes the data; called on download only.
        key: unique on the page.
        name: parts of the file names of downloads.
        alt: one sentence for screen readers.
    """
    stem = file_name(*name, key)
    with st.container(border=True, key=f"card-{key}", gap=None):
        st.plotly_chart(
            fig,
            theme=None,
            key=f"chart-{key}",
            alt=alt,
            config={
                "displaylogo": False,
                "scrollZoom": False,
                "modeBarButtonsToRemove": _MODEBAR,
                "toImageButtonOptions": {"format": "png", "filename": stem, "scale": 2},
            },
        )
        _download(table, key, stem, "Download the data of this chart")


def table_card(
    table: Table,
    *,
    key: str,
    name: tuple[str | int, ...],
    data: Callable[[], Table] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> None:
    """Show a table and a button that downloads it; names of columns are shown without underscores.

    Args:
        table: what to show.
        key: unique on the page.
        name: parts of the file name of the download.
        data: makes what to download, if that is not the table itself.
        columns: Streamlit's column configuration.
    """
    with st.container(border=True, key=f"card-{key}", gap=None):
        shown: dict[str, Any] = {title: dict((columns or {}).get(title, {})) for title in table}
        for title, column in shown.items():
            if re.fullmatch(r"[\w ]+", title):
                column["label"] = title.replace("_", " ")
        st.dataframe(
            table, width="stretch", hide_index=True, key=f"{key}-table", column_config=shown
        )
        _download(
            data or (lambda: table),
            key,
            file_name(*name, key),
            "Download the numbers of this table",
        )


def _download(table: Callable[[], Table], key: str, stem: str, text: str) -> None:
    with st.container(horizontal=True, horizontal_alignment="right"):
        st.download_button(
            "CSV",
            data=lambda: to_csv(table()),
            file_name=f"{stem}.csv",
            mime="text/csv",
            key=f"csv-{key}",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
            help=text,
        )
