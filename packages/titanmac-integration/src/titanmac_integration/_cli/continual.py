"""``titanmac continual``: one task after another, block-sparse and dense."""

import argparse
import sys
from pathlib import Path
from typing import Any

from titanmac_integration._checkpoint import write_json
from titanmac_integration._config import TitanMACConfig
from titanmac_integration._continual import ContinualResult, run_continual
from titanmac_integration._presets import RUN_PRESETS
from titanmac_integration._registry import TASK_NAMES, make_task
from titanmac_integration._report import model_table, retention_table
from titanmac_integration._run_dir import DENSE_DIR, RESULTS_FILE

from .flags import add_run_flags, model_config, resolve_device, training_config
from .session import show_progress, training_session

LEARNED = 0.95
PLAIN_TRAINING_NOTE = """\
Training was plain, without anything that protects an old task: the network forgets it. Moving
blocks alone does not prevent that, and no promise is made here. A later release brings the
mechanism that retains old tasks; these figures are what it has to beat."""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "continual",
        help="train on tasks one after another and measure forgetting",
        description="Train on one task after another, evaluate all of them before, between and "
        "after, and compare with a dense model on the same data, seed and budget.",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        metavar="TASK",
        help=f"sequence of tasks, out of {', '.join(TASK_NAMES)} (default: the preset's)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        help="optimizer steps, one number per task or one for all (default: the preset's)",
    )
    parser.add_argument(
        "--compare-dense",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the dense model too (default: yes, unless --dense)",
    )
    add_run_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train every model on the sequence, print the tables, write results.json."""
    config = model_config(arguments)
    names = tuple(arguments.tasks or RUN_PRESETS[arguments.preset].tasks)
    steps = _steps(arguments, len(names))
    results = []
    try:
        results.append(_train(arguments, config, names, steps, arguments.out))
        if config.use_block_sparse and arguments.compare_dense:
            dense = config.replace(use_block_sparse=False)
            results.append(_train(arguments, dense, names, steps, arguments.out / DENSE_DIR))
    except KeyboardInterrupt:
        print(f"interrupted; what was trained so far is in {arguments.out}", file=sys.stderr)
        return 130
    content = {"results": [result.to_dict() for result in results]}
    write_json(arguments.out / RESULTS_FILE, content)
    _print(arguments.out, results)
    return 0


def _train(
    arguments: argparse.Namespace,
    config: TitanMACConfig,
    names: tuple[str, ...],
    steps: list[int],
    run_dir: Path,
) -> ContinualResult:
    label = "block-sparse" if config.use_block_sparse else "dense"
    tasks = [make_task(name) for name in names]
    with training_session(
        run_dir,
        config,
        training_config(arguments),
        force=arguments.force,
        device=resolve_device(arguments.device),
        tasks=tasks,
        progress=show_progress(arguments.quiet),
        label=label,
        info={"command": "continual", "tasks": list(names), "steps": steps},
    ) as trainer:
        return run_continual(trainer, tasks, steps, name=label)


def _steps(arguments: argparse.Namespace, n_tasks: int) -> list[int]:
    steps = list(arguments.steps or RUN_PRESETS[arguments.preset].steps)
    if len(steps) == 1:
        steps *= n_tasks
    if len(steps) != n_tasks or min(steps) < 1:
        raise ValueError(
            f"--steps (={' '.join(map(str, steps))}) must be one positive number per task "
            f"({n_tasks}), or one for all."
        )
    return steps


def _print(run_dir: Path, results: list[ContinualResult]) -> None:
    print(retention_table(results))
    print()
    print(model_table(results))
    print()
    for result in results:
        for index, metric in enumerate(result.metrics):
            value = result.after_learning(index)
            if metric == "exact_match" and value < LEARNED:
                print(
                    f"Note: {result.model} answered {value:.1%} of the held-out problems of "
                    f"{result.tasks[index]}, below {LEARNED:.0%}: train it longer (--steps) before "
                    "reading its forgetting."
                )
    if len(results[0].tasks) > 1:
        print(PLAIN_TRAINING_NOTE)
    print(f"\nresults: {run_dir / RESULTS_FILE}")
    if results[0].density is not None:
        print(f"look at the topology: blockell-dashboard {run_dir}")
