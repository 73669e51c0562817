"""One HTML file with the charts of a run: no server, no network, Plotly's code included once."""

from __future__ import annotations

import html
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from blockell_format.snapshots import LayerInfo, Problem, SnapshotError

from . import __version__, figures
from .figures import Theme
from .io import LoadedRun, is_run
from .layer_table import layer_table
from .layers import layer_label, layer_order
from .ranks import describe
from .retention import Retention, read_retention
from .retention_stats import group_cells
from .retention_tables import method_table
from .series import is_loss
from .tables import Table

__all__ = ["export_report"]

_STYLE = """\
body { font-family: "Source Sans 3", "Segoe UI", Helvetica, Arial, sans-serif; margin: 0 auto;
  max-width: 1180px; padding: 24px; background: %(background)s; color: %(text)s; }
h1 { font-size: 26px; } h2 { font-size: 20px; margin-top: 40px; }
.plotly-graph-div { margin: 12px 0 28px; }
p, td, th { color: %(muted)s; text-align: left; font-size: 14px; } td { padding: 2px 16px 2px 0; }
"""


def export_report(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    layers: Sequence[str] | None = None,
    theme: Theme = "light",
    overwrite: bool = False,
) -> Path:
    """Write the charts of one run, and of its retention experiments, into one HTML file.

    Args:
        run_dir: the run directory, or one that holds only `retention.jsonl`.
        output: the file to write.
        step: of heatmaps and age histograms; default the newest.
        layers: names of the layers to include; default all.
        theme: "light" or "dark".
        overwrite: replace an existing file.

    Returns:
        `output` as a path.

    Raises:
        RunError: (a ValueError) `run_dir` is no run.
        ValueError: no such layer or step, or the run holds nothing to show.
        FileExistsError: `output` exists and `overwrite` is false.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another name, or overwrite it (--force).")
    run_dir = Path(run_dir)
    results = read_retention(run_dir)
    loaded: LoadedRun | None = None
    parts = [_head(run_dir, theme)]
    charts: list[Iterator[tuple[str, go.Figure]]] = []
    if is_run(run_dir) or not results.cells:
        loaded = LoadedRun(run_dir)
        infos = _chosen_layers(loaded, layers)
        parts += [_about_run(loaded), _divergence(loaded)]
        charts.append(_metric_figure(loaded, theme))
        if loaded.run.steps or step is not None or not (results.cells or loaded.metrics().names):
            step = _chosen_step(loaded, step)
            charts.append(_run_figures(loaded, infos, step, theme))
            parts.append(_layers(loaded, step, infos))
    elif step is not None or layers is not None:
        raise ValueError(f"{run_dir} holds no run, so there is no step or layer to choose.")
    charts.append(_retention_figures(results, theme))
    parts += [*_html(itertools.chain(*charts)), _method_tables(results)]
    # After the reading: damage inside a snapshot is found by then.
    problems = [*(loaded.run.problems if loaded else ()), *results.problems]
    parts += [_problems(problems), "</body></html>\n"]
    # Beside the target, then renamed: a killed export leaves no half report under its name.
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(parts), encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return output


def _chosen_layers(loaded: LoadedRun, names: Sequence[str] | None) -> list[LayerInfo]:
    known = loaded.run.layers
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"layer (={name!r}) is not in the run; layers: {', '.join(known) or 'none'}."
            )
    return [known[name] for name in sorted(names or known, key=layer_order)]


def _chosen_step(loaded: LoadedRun, step: int | None) -> int:
    steps = loaded.run.steps
    if not steps:
        raise ValueError(
            f"{loaded.path} holds no readable snapshot yet and no metric, so there is no chart."
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        nearest = min(steps, key=lambda known: abs(known - step))
        raise ValueError(f"step (={step}) has no snapshot; nearest: {nearest}.")
    return step


def _head(run_dir: Path, theme: Theme) -> str:
    colours = figures.palette(theme)
    title = html.escape(run_dir.resolve().name)
    style = _STYLE % {
        "background": colours.background,
        "text": colours.text,
        "muted": colours.muted,
    }
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>"
        f"<p>Written by blockell-dashboard {__version__}.</p>"
    )


def _about_run(loaded: LoadedRun) -> str:
    steps, run = loaded.history().steps, loaded.run
    processes = "process" if run.world_size == 1 else "processes"
    span = f" from step {steps[0]:,} to {steps[-1]:,}" if len(steps) else ""
    return (
        f"<p>Run {html.escape(run.run_id)}: {len(run.layers):,} layers, {len(steps):,} "
        f"snapshots{span}, {run.world_size:,} {processes}.</p>"
    )


def _divergence(loaded: LoadedRun) -> str:
    apart = loaded.divergence()
    return f"<p><b>{html.escape(describe(apart))}</b></p>" if apart is not None else ""


def _layers(loaded: LoadedRun, step: int, infos: Sequence[LayerInfo]) -> str:
    """The layers of the report at the step of its heatmaps."""
    if len(infos) < 2:
        return ""
    return f"<h2>All layers at step {step:,}</h2>{_table(layer_table(loaded, step, infos))}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in table)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>"
        for row in zip(*table.values(), strict=True)
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if np.isfinite(value) else ""
    return str(value)


def _html(charts: Iterable[tuple[str, go.Figure]]) -> Iterator[str]:
    script: bool = True
    for heading, figure in charts:
        if heading:
            yield f"<h2>{html.escape(heading)}</h2>"
        yield figure.to_html(
            full_html=False,
            include_plotlyjs=script,
            include_mathjax=False,
            config={"displaylogo": False, "responsive": True},
        )
        script = False


def _metric_figure(loaded: LoadedRun, theme: Theme) -> Iterator[tuple[str, go.Figure]]:
    """The training loss, or whatever else was logged."""
    history, metrics = loaded.history(), loaded.metrics()
    names = [name for name in metrics.names if is_loss(name)] or metrics.names
    for name in names[:1]:
        steps, values = metrics.get(name)
        figure = figures.loss(
            steps,
            values,
            name=name,
            decision_steps=history.steps[~history.still],
            alarms=is_loss(name),
            spans=loaded.spans,
            theme=theme,
        )
        yield "Training", figure


def _run_figures(
    loaded: LoadedRun, infos: Sequence[LayerInfo], step: int, theme: Theme
) -> Iterator[tuple[str, go.Figure]]:
    history = loaded.history()
    pooled = history.pooled_rates() if len(infos) > 1 else np.empty(0)
    for info in infos:
        name, series = layer_label(info.name), loaded.series(info.name)
        try:
            layer = loaded.snapshot(info.name, step)
        except SnapshotError:
            continue  # it is in the list of problems
        yield (
            name,
            figures.topology_heatmap(
                layer, info, step=step, value_range=(0.0, series.age_scale), theme=theme
            ),
        )
        if loaded.spans:
            yield (
                "",
                figures.topology_heatmap(
                    layer, info, colour="task", step=step, spans=loaded.spans, theme=theme
                ),
            )
        ages = layer.block_age_steps[layer.col_indices >= 0]
        yield (
            "",
            figures.age_histogram(ages, upper=series.age_limit, step=step, theme=theme, height=320),
        )
        yield (
            "",
            figures.swap_rate(
                history.steps,
                history.rates(info.name),
                name=name,
                all_steps=history.steps[: len(pooled)],
                all_rates=pooled,
                still=history.still,
                spans=loaded.spans,
                theme=theme,
            ),
        )
        shares = history.density(info)
        if np.ptp(shares):
            yield (
                "",
                figures.density(history.steps, shares, name=name, spans=loaded.spans, theme=theme),
            )
        yield (
            "",
            figures.column_entropy(
                series.steps,
                series.entropy,
                series.dead_columns,
                C=info.C,
                name=name,
                spans=loaded.spans,
                theme=theme,
            ),
        )


def _retention_figures(results: Retention, theme: Theme) -> Iterator[tuple[str, go.Figure]]:
    for setting in results.settings:
        groups = group_cells(results.of(setting))
        yield f"Retention: {setting}", figures.retention_tradeoff(groups, theme=theme)
        yield "", figures.old_task_over_steps(groups, theme=theme, height=460)
        for group in groups:
            yield group.label, figures.task_scores(group, theme=theme)
            for kind in figures.MATRIX_KINDS:
                yield "", figures.retention_matrix(group, kind=kind, theme=theme, height=360)


def _method_tables(results: Retention) -> str:
    """Per experiment, what the dashboard's table of methods shows."""
    parts = []
    for setting in results.settings:
        table = _table(method_table(group_cells(results.of(setting))))
        parts.append(
            f"<h2>Methods: {html.escape(setting)}</h2><p>Mean ± standard deviation [lowest to "
            "highest] over seeds, on test data; one number where all seeds agree to the digits "
            f"shown.</p>{table}"
        )
    return "".join(parts)


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(problem.path.name)}</td><td>{html.escape(problem.reason)}</td></tr>"
        for problem in problems
    )
    return (
        f"<h2>Problems ({len(problems):,})</h2><p>These files were left out, or hold something odd."
        f"</p><table><tr><th>file</th><th>reason</th></tr>{rows}</table>"
    )
