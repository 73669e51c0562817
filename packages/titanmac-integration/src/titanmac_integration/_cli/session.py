"""What ``train`` and ``continual`` share: one model in one run directory."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from blockell_format.snapshots import LayerInfo, SnapshotWriter
from titanmac_integration._checkpoint import save_checkpoint
from titanmac_integration._config import TitanMACConfig
from titanmac_integration._model import create_titanmac_model
from titanmac_integration._run_dir import prepare_run_dir
from titanmac_integration._tasks import Task
from titanmac_integration._training import Trainer
from titanmac_integration._training_config import TrainingConfig


@contextlib.contextmanager
def training_session(
    run_dir: Path,
    config: TitanMACConfig,
    training: TrainingConfig,
    *,
    force: bool,
    device: torch.device,
    tasks: Sequence[Task],
    progress: bool,
    label: str,
    info: dict[str, Any],
) -> Iterator[Trainer]:
    """A trainer that records into ``run_dir``; whatever happens, the model is saved at the end.

    All settings are checked, and the model is made, before a directory is made or replaced.
    """
    training.check_fits(config)
    for task in tasks:
        if config.vocab_size < task.min_vocab_size:
            raise ValueError(
                f"vocab_size (={config.vocab_size}) must be at least {task.min_vocab_size}, the "
                f"vocabulary of task {task.name}."
            )
    torch.manual_seed(training.seed)  # dropout draws from the global generator
    model = create_titanmac_model(config, seed=training.seed, device=device)
    prepare_run_dir(run_dir, force=force)
    layers = [
        LayerInfo(name=name, R=x.R, C=x.C, K=x.K, B=x.B, row_group=x.row_group)
        for name, x in model.block_sparse_layers.items()
    ]
    content = {"model": config.to_dict(), "training": training.to_dict(), **info}
    with SnapshotWriter(run_dir, layers=layers, config=content) as writer:
        trainer = Trainer(
            model, training, writer=writer, eval_tasks=tasks, progress=progress, label=label
        )
        try:
            yield trainer
        finally:
            save_checkpoint(model, run_dir, info={"step": trainer.step})


def show_progress(quiet: bool) -> bool:
    """Progress bars are for people: none with --quiet or when standard error is not a terminal."""
    return not quiet and sys.stderr.isatty()
