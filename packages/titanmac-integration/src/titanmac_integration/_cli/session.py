"""What ``train`` and ``continual`` share: one model in one run directory."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from blockell_format.snapshots import LayerInfo, SnapshotWriter
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._data._tasks import Mixture, Task
from titanmac_integration._model._checkpoint import save_checkpoint
from titanmac_integration._model._titanmac import create_titanmac_model
from titanmac_integration._run_dir import prepare_run_dir
from titanmac_integration._seeding import stream
from titanmac_integration._training._config import TrainingConfig
from titanmac_integration._training._processes import rank, world_size
from titanmac_integration._training._random import seed_global_random_state
from titanmac_integration._training._trainer import Trainer


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
    resume: Path | None = None,
    **trainer_options: Any,
) -> Iterator[Trainer]:
    """A trainer that records into ``run_dir``; whatever happens, the model is saved at the end.

    All settings are checked, and the model is made, before a directory is made or replaced. Of
    several processes only number 0 writes. With ``resume``, a checkpoint's directory, the run there
    is continued.
    """
    training.check_fits(config)
    for task in tasks:
        if config.vocab_size < task.min_vocab_size:
            raise ValueError(
                f"vocab_size (={config.vocab_size}) must be at least {task.min_vocab_size}, the "
                f"vocabulary of task {task.name}."
            )
        # data too short for seq_len is refused here, not after a run was replaced
        task.batch(1, training.seq_len, torch.Generator().manual_seed(0))
    # dropout draws from the global generator, in every process something else
    seed = training.seed if rank() == 0 else _process_seed(training.seed)
    seed_global_random_state(seed)
    model = create_titanmac_model(config, seed=training.seed, device=device)
    content = {"model": config.to_dict(), "training": training.to_dict(), **info}
    trainer = Trainer(
        model,
        training,
        eval_tasks=tasks,
        progress=progress and rank() == 0,
        label=label,
        **trainer_options,
    )
    if resume is not None:
        # whatever is wrong is told before anything is written
        trainer.load(resume)
        trainer.check_continues(Mixture(tasks), info["steps"])
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            if resume is None:
                prepare_run_dir(run_dir, force=force)
            trainer.record_into(stack.enter_context(_writer(run_dir, trainer, content, resume)))
        try:
            yield trainer
        except OSError as error:
            # the disk is full: the next attempt to write would hide the first one's message
            if error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, str(run_dir)) from error
            raise
        except BaseException:
            _save(trainer, run_dir, info)
            raise
        _save(trainer, run_dir, info)


def _save(trainer: Trainer, run_dir: Path, info: dict[str, Any]) -> None:
    if rank() == 0:
        save_checkpoint(trainer.model, run_dir, info={"step": trainer.step, **info})


def _writer(
    run_dir: Path, trainer: Trainer, content: dict[str, Any], resume: Path | None
) -> SnapshotWriter:
    layers = [
        LayerInfo(name=name, R=x.R, C=x.C, K=x.K, B=x.B, row_group=x.row_group)
        for name, x in trainer.model.block_sparse_layers.items()
    ]
    options: dict[str, Any] = {"layers": layers, "config": content, "world_size": world_size()}
    if resume is not None:
        options |= {"mode": "resume", "resume_step": trainer.step}
    return SnapshotWriter(run_dir, **options)


def _process_seed(seed: int) -> int:
    return stream(seed, f"process {rank()}").initial_seed()


def show_progress(quiet: bool) -> bool:
    """Progress bars are for people: none with --quiet or when standard error is not a terminal."""
    return not quiet and sys.stderr.isatty()
