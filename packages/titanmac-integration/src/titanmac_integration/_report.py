"""Tables for the terminal."""

from collections.abc import Sequence

from ._continual import ContinualResult

UNITS = {"exact_match": "exact match", "bits_per_byte": "bits per byte"}
HARDLY_LEARNED = 0.05


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join((line(header), rule, *map(line, rows)))


def retention_table(results: Sequence[ContinualResult]) -> str:
    """Per model and task: the measure before, after learning, at the end, and what was lost."""
    header = (
        "model",
        "task",
        "measure",
        "untrained",
        "after learning it",
        "at the end",
        "relative forgetting",
    )
    rows = []
    for result in results:
        for index, task in enumerate(result.tasks):
            metric = result.metrics[index]
            rows.append(
                (
                    result.model,
                    task,
                    UNITS.get(metric, metric),
                    format_measure(metric, result.matrix[0][index]),
                    format_measure(metric, result.after_learning(index)),
                    format_measure(metric, result.at_end(index)),
                    format_forgetting(result, index),
                )
            )
    return format_table(header, rows)


def model_table(results: Sequence[ContinualResult]) -> str:
    """Per model: size, time and what the topology did."""
    header = (
        "model",
        "parameters",
        "seconds",
        "decisions",
        "swap rate min / mean / max",
        "column entropy",
        "topology time",
    )
    rows = []
    for result in results:
        rates = result.swap_rates
        mean = sum(rates) / len(rates) if rates else 0.0
        swaps = f"{min(rates):.1%} / {mean:.1%} / {max(rates):.1%}" if rates else "-"
        entropy = result.column_entropy
        rows.append(
            (
                result.model,
                f"{result.parameters:,}",
                f"{result.seconds:.0f}",
                str(len(rates)) if rates else "-",
                swaps,
                "-" if entropy is None else f"{entropy:.3f}",
                "-" if entropy is None else f"{result.topology_share:.1%}",
            )
        )
    return format_table(header, rows)


def format_forgetting(result: ContinualResult, task: int) -> str:
    """Relative forgetting in percent; "-" for the last task, nothing comes after it.

    Of a task that was hardly learned, the quotient would be noise over noise.
    """
    lost = result.forgetting(task)
    if task == len(result.tasks) - 1:
        return "-"
    chance = result.chance[task]
    learned = abs(result.after_learning(task) - chance)
    if lost is None or learned < HARDLY_LEARNED * max(chance, 1.0 - chance):
        return "not learned"
    return f"{lost:.1%}"


def format_measure(metric: str, value: float) -> str:
    """A share in percent, bits with two decimals."""
    return f"{value:.1%}" if metric == "exact_match" else f"{value:.2f}"
