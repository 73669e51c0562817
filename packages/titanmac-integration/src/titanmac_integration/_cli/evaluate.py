"""``titanmac eval``: the measures of a saved model."""

import argparse
from pathlib import Path
from typing import Any

from titanmac_integration._checkpoint import load_checkpoint
from titanmac_integration._registry import TASK_NAMES, make_task
from titanmac_integration._report import UNITS, format_measure, format_table

from .flags import resolve_device


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "eval",
        help="evaluate the model of a run directory",
        description="Evaluate the model that a run left behind.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES), metavar="TASK"
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", ...')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table of measures."""
    model = load_checkpoint(arguments.run_dir, device=resolve_device(arguments.device))
    rows = []
    for task in map(make_task, arguments.tasks):
        value = format_measure(task.metric, task.evaluate(model))
        rows.append((task.name, UNITS[task.metric], value))
    print(format_table(("task", "measure", "value"), rows))
    return 0
