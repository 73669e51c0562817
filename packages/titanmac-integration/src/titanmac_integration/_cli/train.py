"""``titanmac train``: one task, or a mixture of tasks; built-in ones or the user's files."""

import argparse
import contextlib
import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from titanmac_integration._data._registry import TASK_NAMES
from titanmac_integration._data._tasks import Mixture
from titanmac_integration._data._tokenizer import BYTES
from titanmac_integration._loggers import TensorBoardLogger, WandbLogger, check_extra
from titanmac_integration._model._checkpoint import write_json
from titanmac_integration._report import UNITS, format_measure, format_table
from titanmac_integration._run_dir import RESULTS_FILE, TENSORBOARD_DIR, TOKENIZER_FILE
from titanmac_integration._training._checkpoint import CHECKPOINTS_DIR, CheckpointStore
from titanmac_integration._training._config import TrainingConfig
from titanmac_integration._training._graphed_step import can_be_graphed
from titanmac_integration._training._processes import process_group, rank, world_size
from titanmac_integration._training._report import PhaseReport
from titanmac_integration._training._trainer import Trainer, TrainingStopped

from .flags import add_run_flags, given_fields, resolve_device
from .plan import LATEST, TrainPlan, make_plan
from .session import show_progress, training_session
from .signals import StopSignals

BITS = "bits_per_byte"


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "train",
        help="train on one task or a mixture",
        description="Train a model on one task, or on a mixture of tasks, and evaluate it. Several "
        "processes: torchrun --nproc-per-node 4 -m titanmac_integration train ...",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        metavar="TASK",
        help=f"tasks to mix, out of {', '.join(TASK_NAMES)} (default: the preset's first)",
    )
    data = parser.add_argument_group("data from files")
    data.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text, or JSON lines (.jsonl) with a text, or a question and an answer, per line",
    )
    data.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json of Hugging Face's tokenizers (default: bytes)",
    )
    data.add_argument(
        "--held-out",
        type=float,
        metavar="FRAC",
        help="share at the end of every file that is kept for evaluation (default: 0.1)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the preset's)")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="STEP",
        help="continue the run in RUN_DIR from its last checkpoint, or from the one of STEP; all "
        "settings are the run's",
    )
    run.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="optimizer steps between checkpoints; one is always written at the end (default: 500)",
    )
    run.add_argument("--keep-checkpoints", type=int, metavar="N", help="how many stay (default: 2)")
    run.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="write RUN_DIR/tensorboard, too (extra)",
    )
    run.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too (extra)")
    add_run_flags(parser)
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    """Train, evaluate, save."""
    if arguments.resume not in (None, LATEST) and not arguments.resume.isdecimal():
        raise ValueError(f"--resume (={arguments.resume}) must be the step of a checkpoint.")
    if arguments.resume is not None and arguments.force:
        raise ValueError("--resume continues a run and --force replaces it; give one of them.")
    device = resolve_device(arguments.device)
    plan = make_plan(arguments)
    with process_group(device), StopSignals() as stop:
        try:
            return _train(arguments, plan, device, stop)
        except (TrainingStopped, KeyboardInterrupt) as stopped:
            if rank() == 0:
                said = str(stopped) or "stopped at once"
                saved = CheckpointStore(arguments.out / CHECKPOINTS_DIR).steps()
                how = f"continue with: titanmac train --resume --out {arguments.out}"
                print(f"{said}; {how if saved else 'no checkpoint yet'}", file=sys.stderr)
            return stop.exit_status


def _train(
    arguments: argparse.Namespace, plan: TrainPlan, device: torch.device, stop: StopSignals
) -> int:
    options = plan.options
    store = CheckpointStore(arguments.out / CHECKPOINTS_DIR, keep=options["keep_checkpoints"])
    for extra in ("tensorboard", "wandb"):
        if options[extra]:
            check_extra(extra)
    info = {
        "command": "train",
        **options,
        "source": plan.source,
        "steps": plan.steps,
        "tasks": [task.name for task in plan.tasks],
    }
    if "cuda_graph" not in given_fields(arguments, TrainingConfig):
        graphs = can_be_graphed(plan.training, plan.model, device)
        training = dataclasses.replace(plan.training, cuda_graph=graphs)
        plan = dataclasses.replace(plan, training=training)
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(
            training_session(
                arguments.out,
                plan.model,
                plan.training,
                force=arguments.force,
                device=device,
                tasks=plan.tasks,
                progress=show_progress(arguments.quiet),
                label="",
                info=info,
                resume=plan.resume,
                checkpoints=store,
                checkpoint_every=options["checkpoint_every"],
                stop=stop,
            )
        )
        if rank() == 0:
            if plan.resume is not None:
                store.supersede(trainer.step)
            if plan.source["tokenizer"] != BYTES and plan.resume is None:
                shutil.copyfile(plan.source["tokenizer"], arguments.out / TOKENIZER_FILE)
            for logger in _loggers(options, arguments.out, info, trainer):
                stack.callback(logger.close)
                trainer.add_logger(logger)
        with stop.at_once():  # schedulers do not wait long, and nothing is learned yet
            before = plan.before or _evaluate(trainer, plan)
        trainer.info = {**info, "before": before}
        report = trainer.fit(Mixture(plan.tasks), plan.steps)
        after = _evaluate(trainer, plan)
        trainer.log(after)
    if rank() == 0:
        _conclude(arguments, plan, info, report, before, after)
    return 0


def _evaluate(trainer: Trainer, plan: TrainPlan) -> dict[str, float]:
    """Measures of all tasks, in process 0."""
    if rank() != 0:
        return {}
    return {f"eval/{t.name}/{t.metric}": t.evaluate(trainer.model) for t in plan.tasks}


def _loggers(
    asked: dict[str, Any], out: Path, info: dict[str, Any], trainer: Trainer
) -> list[TensorBoardLogger | WandbLogger]:
    loggers: list[TensorBoardLogger | WandbLogger] = []
    if asked["tensorboard"]:
        loggers.append(TensorBoardLogger(out / TENSORBOARD_DIR))
    if asked["wandb"]:
        config = {"model": trainer.model.config.to_dict(), "training": trainer.config.to_dict()}
        run_id = trainer.writer.run_id if trainer.writer else None
        settings: dict[str, Any] = {"id": run_id, "resume": "allow", "config": {**config, **info}}
        loggers.append(WandbLogger(asked["wandb"], out, **settings))
    return loggers


def _conclude(
    arguments: argparse.Namespace,
    plan: TrainPlan,
    info: dict[str, Any],
    report: PhaseReport,
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    results = {
        **info,
        "measures": after,
        "untrained": before,
        "seconds": report.seconds,
        "eval_seconds": report.eval_seconds,
        "checkpoint_seconds": report.checkpoint_seconds,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens_per_second,
        "topology_frac": report.topology_frac,
        "peak_memory_bytes": report.peak_memory_bytes,
        "processes": world_size(),
        "cuda_graph": plan.training.cuda_graph,
    }
    write_json(arguments.out / RESULTS_FILE, results)
    rows = []
    for task in plan.tasks:
        key = f"eval/{task.name}/{task.metric}"
        values = (format_measure(task.metric, m[key]) for m in (before, after))
        rows.append((task.name, UNITS[task.metric], *values))
    print(format_table(("task", "measure", "untrained", "trained"), rows))
    replayed = " replayed from CUDA graphs" if plan.training.cuda_graph else ""
    print(
        f"\n{report.steps} steps{replayed}, {report.tokens:,} tokens, {report.seconds:.0f} s: "
        f"{report.tokens_per_second:,.0f} tokens/s; topology {report.topology_frac:.1%} of the "
        f"time, peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB"
    )
    known = _known_by_heart(plan, report, after)
    if known:
        print(known)
    print(f"run directory: {arguments.out}")


def _known_by_heart(plan: TrainPlan, report: PhaseReport, after: dict[str, float]) -> str:
    """What to do where held-out text costs far more than the text that was trained on."""
    if len(plan.tasks) > 1 or plan.source["tokenizer"] != BYTES:
        return ""  # the training loss is that of all tasks, in nats per token
    seen, held_out = report.final_loss / math.log(2), after.get(f"eval/{plan.tasks[0].name}/{BITS}")
    if held_out is None or not held_out > 1.25 * seen + 0.1:
        return ""
    return (
        f"The text that was trained on costs {seen:.2f} bits per byte, held-out text "
        f"{held_out:.2f}: much of it is known by heart. Fewer --steps, more --dropout or more text "
        "help."
    )
