"""``titanmac train``: one task, or a mixture of tasks."""

import argparse
import sys
from typing import Any

from titanmac_integration._checkpoint import write_json
from titanmac_integration._presets import RUN_PRESETS
from titanmac_integration._registry import TASK_NAMES, make_task
from titanmac_integration._report import UNITS, format_measure, format_table
from titanmac_integration._run_dir import RESULTS_FILE
from titanmac_integration._tasks import Mixture

from .flags import add_run_flags, model_config, resolve_device, training_config
from .session import show_progress, training_session


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "train",
        help="train on one task or a mixture",
        description="Train a model on one task, or on a mixture of tasks, and evaluate it.",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        metavar="TASK",
        help=f"tasks to mix, out of {', '.join(TASK_NAMES)} (default: the preset's first)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the preset's)")
    add_run_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate, save."""
    preset = RUN_PRESETS[arguments.preset]
    config, training = model_config(arguments), training_config(arguments)
    device = resolve_device(arguments.device)
    tasks = [make_task(name) for name in dict.fromkeys(arguments.tasks or preset.tasks[:1])]
    steps = preset.steps[0] if arguments.steps is None else arguments.steps
    if steps < 1:
        raise ValueError(f"--steps (={steps}) must be at least 1.")
    info = {"command": "train", "tasks": [task.name for task in tasks], "steps": steps}
    try:
        with training_session(
            arguments.out,
            config,
            training,
            force=arguments.force,
            device=device,
            tasks=tasks,
            progress=show_progress(arguments.quiet),
            label="",
            info=info,
        ) as trainer:
            before = [task.evaluate(trainer.model) for task in tasks]
            report = trainer.fit(Mixture(tasks), steps)
            after = [task.evaluate(trainer.model) for task in tasks]
            final = {f"eval/{t.name}/{t.metric}": v for t, v in zip(tasks, after, strict=True)}
            assert trainer.writer is not None
            trainer.writer.log(final, trainer.step)
    except KeyboardInterrupt:
        print(f"interrupted; the model so far is in {arguments.out}", file=sys.stderr)
        return 130
    write_json(arguments.out / RESULTS_FILE, {**info, "measures": final, "seconds": report.seconds})
    rows = [
        (t.name, UNITS[t.metric], format_measure(t.metric, b), format_measure(t.metric, a))
        for t, b, a in zip(tasks, before, after, strict=True)
    ]
    print(format_table(("task", "measure", "untrained", "trained"), rows))
    print(f"\n{report.steps} steps, {report.tokens:,} tokens, {report.seconds:.0f} s")
    print(f"run directory: {arguments.out}")
    return 0
