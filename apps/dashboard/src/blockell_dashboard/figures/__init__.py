"""Every chart as a function from arrays to a `plotly.graph_objects.Figure`.

None of them needs Streamlit, so they work in a notebook or a script as well.
"""

from ._ages import age_histogram
from ._compare import compare_runs
from ._retention import old_task_over_steps, retention_tradeoff, task_scores
from ._retention_matrix import MATRIX_KINDS, MatrixKind, retention_matrix
from ._series import column_entropy, density, loss, swap_rate
from ._theme import Palette, Theme, palette
from ._topology import COLOURS, Colour, topology_heatmap

__all__ = [
    "COLOURS",
    "MATRIX_KINDS",
    "Colour",
    "MatrixKind",
    "Palette",
    "Theme",
    "age_histogram",
    "column_entropy",
    "compare_runs",
    "density",
    "loss",
    "old_task_over_steps",
    "palette",
    "retention_matrix",
    "retention_tradeoff",
    "swap_rate",
    "task_scores",
    "topology_heatmap",
]
