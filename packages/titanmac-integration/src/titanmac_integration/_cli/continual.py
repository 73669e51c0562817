"""``titanmac continual``: one task after another, with and without methods against forgetting."""

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from blockell_format.snapshots import open_run
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._model._titanmac import create_titanmac_model
from titanmac_integration._protocol._methods import (
    METHOD_HELP,
    Asked,
    parse_methods,
)
from titanmac_integration._protocol._protocol import CHECKPOINTS_DIR, Protocol
from titanmac_integration._protocol._records import (
    RECORDS_FILE,
    SUMMARY_FILE,
    read_records,
    record_id,
)
from titanmac_integration._protocol._settings import SETTINGS, Setting
from titanmac_integration._protocol._summary import summarise
from titanmac_integration._protocol._tables import retention_tables
from titanmac_integration._protocol._tasks import TASK_HELP, file_digest
from titanmac_integration._run_dir import RUN_FILE, prepare_run_dir
from titanmac_integration._training._config import TrainingConfig
from titanmac_integration._training._optimizer import make_optimizer

from .flags import add_fields, given_fields, resolve_device
from .session import show_progress
from .signals import TerminationInterrupts

DEFAULT_METHODS = {
    "demo": ("ours-damped@sparse:9e-3", "fine-tuning=6e-3"),
    "pilot": ("ours:5e-4", "fine-tuning=3e-4"),
    "small": ("ours-damped@sparse:8e-3", "fine-tuning=4e-3"),
}
"""Ours and fine-tuning by preset, at the best rates by validation loss on seeds of their own."""


EXAMPLES = """\
examples:
  titanmac continual --out runs/demo
  titanmac continual --out runs/mine --tasks qa:questions.jsonl text:novel.txt \\
      --steps 1200 400 --methods ours-releasing fine-tuning=6e-3 --seeds 0 1

exit status: 0 done, also where --time-limit left something out; 1 error, or all
trainings broke down; 2 unknown flag; 130 interrupted (143 by SIGTERM)"""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "continual",
        help="train on tasks one after another and measure what is forgotten",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Train on one task after another by several methods, all from the same checkpoint "
            "after the first task, and measure what each learns and forgets. No data of old tasks "
            "is used, and no task label, unless a method says so. Finished cells (method, dial, "
            "seed) are kept: the same command again runs only what is missing.",
            80,
        ),
        epilog=f"{METHOD_HELP}\n\n{EXAMPLES}",
    )
    parser.add_argument(
        "--preset",
        choices=sorted(SETTINGS),
        default="demo",
        help="model shape, tasks, steps and rates to start from (default: demo)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN_DIR", help="directory of the results"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what RUN_DIR may hold instead of going on"
    )
    defaults = "; ".join(
        f"{preset}: {' '.join(these)}" for preset, these in DEFAULT_METHODS.items()
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"what to compare, see below (default: of preset {defaults})",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: --seed")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"sequence out of {TASK_HELP}")
    for name, kind, what in (
        ("steps", int, "optimizer steps"),
        ("rates", float, "largest learning rates"),
        ("batch-sizes", int, "sequences per step"),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=kind,
            help=f"{what}, one number per task or one for all (default: the preset's)",
        )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no cell that would probably end later; a later call goes on",
    )
    parser.add_argument(
        "--record",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write metrics, snapshots and the model of the first method and seed into RUN_DIR, "
        "for the dashboard (default: yes)",
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", ...')
    parser.add_argument(
        "--tf32", action="store_true", help="products of float32 matrices in TF32 on a GPU"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the results")
    add_fields(parser.add_argument_group("training, all tasks"), TrainingConfig)
    add_fields(parser.add_argument_group("model, all architectures"), TitanMACConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run every cell that is missing, print the tables; 1 if all trainings broke down."""
    setting = _setting(arguments)
    asked = parse_methods(arguments.methods or [*DEFAULT_METHODS[arguments.preset]])
    seeds = arguments.seeds or [getattr(arguments, "seed", 0)]
    if not all(0 <= seed < 1 << 64 for seed in seeds):
        raise ValueError(f"seeds (={seeds}) must be in [0, 2**64).")
    for cell in asked:  # before anything is trained
        rate = cell.make().learning_rate
        for number in range(len(setting.tasks)):
            training = setting.training_config(number, 0, rate if number else None)
            config = setting.config(cell.arch)
            training.check_fits(config)
            if training.cms_levels:  # their patterns must name parameters
                make_optimizer(create_titanmac_model(config, device="meta"), training)
    out = arguments.out
    protocol = Protocol(
        setting,
        out,
        device=resolve_device(arguments.device),
        record=arguments.record,
        progress=show_progress(arguments.quiet),
        report=lambda record: _announce(record, quiet=arguments.quiet),
    )
    for task in protocol.tasks:
        _check_vocabulary(setting.config(asked[0].arch), task.name, task.min_vocab_size)
    protocol.record = _prepare(
        out, setting, asked, seeds, force=arguments.force, record=arguments.record
    )
    if arguments.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(seeds[0])  # dropout draws from the global generator
    with TerminationInterrupts() as stopped:
        try:
            complete = protocol.run(asked, seeds, time_limit_s=arguments.time_limit)
        except KeyboardInterrupt:
            print(f"interrupted; what was trained so far is in {out}", file=sys.stderr)
            return stopped.exit_status
    wanted = {record_id(setting.key, cell, seed) for cell in asked for seed in seeds}
    records = [record for record in read_records([out]) if record["id"] in wanted]
    all_broke_down = all(record["failed"] for record in records)
    if not all_broke_down:
        print(retention_tables(summarise(records)))
    for record in records:
        if record["failed"]:
            print(f"\n{record['id']} broke down: {record['failed']}")
    if not complete:
        print("\nnot complete: the same command again runs what is missing")
    print(f"\nresults: {out / RECORDS_FILE}, summary: {out / SUMMARY_FILE}")
    if (out / RUN_FILE).exists():
        print(f"look at the first of these runs: blockell-dashboard {out}")
    return 1 if records and all_broke_down else 0


def _setting(arguments: argparse.Namespace) -> Setting:
    """The preset with the flags that were given."""
    setting = SETTINGS[arguments.preset]
    given = given_fields(arguments, TrainingConfig)
    given.pop("seed", None)
    changes: dict[str, Any] = {"training": {**setting.training, **given}}
    for name, flag in (("lr", "rates"), ("batch_size", "batch_sizes")):
        value = getattr(arguments, flag)
        if value is None and name in given:
            value = [given[name]]
        if value is not None:
            changes[name] = tuple(value)
    if arguments.tasks:
        changes["tasks"] = tuple(arguments.tasks)
        changes.setdefault("lr", setting.lr[:1] + setting.lr[1:2] * (len(arguments.tasks) - 1))
        sizes = setting.batch_size
        changes.setdefault("batch_size", sizes[:1] + sizes[1:2] * (len(arguments.tasks) - 1))
        steps = setting.steps
        changes["steps"] = steps[:1] + steps[1:2] * (len(arguments.tasks) - 1)
    if arguments.steps:
        changes["steps"] = tuple(arguments.steps)
    changes["changes"] = given_fields(arguments, TitanMACConfig)
    digests = tuple(file_digest(name) for name in changes.get("tasks", ()))
    changes["files"] = digests if any(digests) else ()
    return setting.changed(**changes)


def _prepare(
    out: Path, setting: Setting, asked: list[Asked], seeds: list[int], *, force: bool, record: bool
) -> bool:
    """Clear the directory, or make sure that it can be gone on with; returns whether to record.

    A recording that is complete stays, whatever it was of.

    Raises:
        FileExistsError: it holds a run of another command and ``force`` is off, or another process
            is recording.
    """
    if not (out / RUN_FILE).exists() or force:
        prepare_run_dir(out, force=force)
        if force:
            for name in (RECORDS_FILE, SUMMARY_FILE):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / CHECKPOINTS_DIR, ignore_errors=True)
        return record
    recorded = open_run(out).config or {}
    done = {r["id"]: (r["method"], r["seed"]) for r in read_records([out])}
    if recorded.get("command") != "continual":
        prepare_run_dir(out, force=False)  # refuses
    if not record or record_id(setting.key, asked[0], seeds[0]) in done:
        return record
    method, seed = recorded.get("method"), recorded.get("seed")
    if (method, seed) in done.values():
        print(
            f"{out} keeps its recording, of {method} with seed {seed}; record in another directory",
            file=sys.stderr,
        )
        return False
    prepare_run_dir(out, force=True)  # its recording was cut off, and begins again
    return True


def _check_vocabulary(config: TitanMACConfig, task: str, needed: int) -> None:
    if config.vocab_size < needed:
        raise ValueError(
            f"vocab_size (={config.vocab_size}) must be at least {needed}, the vocabulary of task "
            f"{task}."
        )


def _announce(record: dict[str, Any], *, quiet: bool) -> None:
    """A line per finished cell on standard error, for people who wait."""
    if show_progress(quiet):
        print(f"finished {record['id']}", file=sys.stderr)
