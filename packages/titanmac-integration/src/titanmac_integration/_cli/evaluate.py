"""``titanmac eval``: the measures of a saved model."""

import argparse
from pathlib import Path
from typing import Any

from titanmac_integration._data._registry import TASK_NAMES
from titanmac_integration._model._checkpoint import load_checkpoint
from titanmac_integration._report import UNITS, format_measure, format_table

from .flags import resolve_device
from .plan import make_tasks, stored_tokenizer
from .saved import newest_model, trained_on


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "eval",
        help="evaluate the model of a run directory",
        description="Evaluate the model that a run left behind, or the last checkpoint of a run "
        "that was killed, on what it was trained on or what you name.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, or of a checkpoint"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        metavar="TASK",
        help=f"out of {', '.join(TASK_NAMES)} (default: what the run was trained on)",
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, metavar="FILE", help="files, as titanmac train takes them"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="FRAC",
        help="share at the end of every file that is evaluated (default: the run's)",
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", ...')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table of measures."""
    directory = newest_model(arguments.run_dir)
    model = load_checkpoint(directory, device=resolve_device(arguments.device))
    source = _source(arguments, directory)
    tasks, needed = make_tasks(source, eval_length=min(model.config.max_seq_len, 1024) - 1)
    if needed > model.config.vocab_size:
        raise ValueError(
            f"the data needs a vocabulary of {needed}, but the model of {directory} has one of "
            f"{model.config.vocab_size}; evaluate it with what it was trained for."
        )
    rows = []
    for task in tasks:
        value = format_measure(task.metric, task.evaluate(model))
        rows.append((task.name, UNITS[task.metric], value))
    print(format_table(("task", "measure", "value"), rows))
    return 0


def _source(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What to evaluate on: what is asked for, else what the run was trained on."""
    known = trained_on(directory) or {"tasks": TASK_NAMES, "data": [], "held_out": 0.1}
    if arguments.tasks or arguments.data:
        known |= {"tasks": arguments.tasks or [], "data": arguments.data or []}
    if arguments.held_out is not None:
        known["held_out"] = arguments.held_out
    missing = [str(path) for path in known["data"] if not Path(path).exists()]
    if missing and not arguments.data:
        raise ValueError(
            f"the run was trained on {', '.join(missing)}, which is not there any more; say with "
            "--data or --tasks what to evaluate on."
        )
    return {**known, "tokenizer": stored_tokenizer(arguments.run_dir)}
