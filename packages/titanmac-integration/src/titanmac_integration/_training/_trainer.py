"""The training loop: an optimizer, and the topology at the levels of the clock."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockell_format.snapshots import SnapshotWriter
from cms_topology import Logger, StepReport, TopologyManager
from titanmac_integration._data._tasks import Mixture, Task
from titanmac_integration._loggers import MultiLogger
from titanmac_integration._model._titanmac import TitanMAC
from titanmac_integration._seeding import stream

from ._batches import BatchStream
from ._callback import TrainerCallback
from ._checkpoint import CheckpointStore, read_training_checkpoint
from ._config import TrainingConfig
from ._graphed_step import GraphedStepRunner
from ._log import (
    evaluate_in_between,
    log_progress,
    progress_bar,
    write_first_snapshot,
)
from ._optimizer import check_optimizer, make_manager, make_optimizer, set_rate
from ._phase import Phase
from ._processes import rank, sum_over_processes, world_size
from ._report import PhaseReport, peak_memory_bytes
from ._state import load_trainer_state, trainer_state
from ._step import StepRunner

__all__ = ["NonFiniteLossError", "PhaseReport", "Trainer", "TrainerCallback", "TrainingStopped"]


class NonFiniteLossError(RuntimeError):
    """Loss or gradients were infinite or NaN for many batches in a row."""


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """Training ended before its last step because it was asked to."""


class Trainer:
    """Trains one model on one task after another, with one optimizer and one clock throughout.

    The same model, settings and tasks give the same result to the bit on one machine and thread
    count, continued from a checkpoint or not. Each call of :meth:`fit` has its own learning-rate
    schedule. Under torchrun every process makes the same trainer; each works on its share of every
    batch.

    Args:
        model: the model; it stays on its device.
        config: settings.
        writer: receives metrics, and a snapshot at the start and at every topology decision. Only
            in process 0.
        eval_tasks: evaluated every ``config.eval_every`` steps.
        progress: whether a progress bar is shown on standard error.
        label: what the progress bar calls the model.
        optimizer: a ready optimizer of the model's parameters. Its groups' learning rates are the
            peaks of the schedule; what ``config`` says of the optimizer is not used. One that
            drives the topology itself (``DeepNestedOptimizer``) goes on doing so. Default: the one
            that ``config`` describes.
        callbacks: called at the events of :class:`TrainerCallback`, in this order; an object needs
            only the methods that it uses. One with ``state_dict`` and ``load_state_dict`` is part
            of the checkpoints.
        loggers: receive the metrics that ``writer`` receives: ``log(metrics, step)``.
        checkpoints: where checkpoints go; None writes none.
        checkpoint_every: optimizer steps between checkpoints; one is also written at the end of
            :meth:`fit` and when it is stopped. 0 writes only those.
        stop: asked after every step; True ends :meth:`fit` with :class:`TrainingStopped`, in all
            processes as soon as one says so.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: settings, model and ``optimizer`` do not go together.
    """

    def __init__(
        self,
        model: TitanMAC,
        config: TrainingConfig,
        *,
        writer: SnapshotWriter | None = None,
        eval_tasks: Sequence[Task] = (),
        progress: bool = False,
        label: str = "",
        optimizer: torch.optim.Optimizer | None = None,
        callbacks: Sequence[object] = (),
        loggers: Sequence[Logger] = (),
        checkpoints: CheckpointStore | None = None,
        checkpoint_every: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        config.check_fits(model.config)
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every (={checkpoint_every}) must be 0 (off) or more.")
        self.model, self.config = model, config
        self.writer, self.eval_tasks = writer, tuple(eval_tasks)
        self.progress, self.label = progress, label
        self.device = next(model.parameters()).device
        self.callbacks = tuple(callbacks)
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.stop = stop
        self.info: dict[str, Any] = {}
        """What JSON can hold; part of every checkpoint."""
        self._logger = MultiLogger([writer, *loggers] if writer is not None else loggers)
        if optimizer is not None:
            check_optimizer(model, optimizer)
        self.optimizer = optimizer if optimizer is not None else make_optimizer(model, config)
        for group in self.optimizer.param_groups:
            group.setdefault(
                "initial_lr", float(group["lr"])
            )  # torch's schedulers use this key, too
        self._optimizer_drives = getattr(self.optimizer, "topology", None) is not None
        self.manager: TopologyManager | None = make_manager(model, config, self.optimizer)
        self._tell_manager()
        self.step = 0
        """Optimizer steps so far."""
        runner = GraphedStepRunner if config.cuda_graph else StepRunner
        self._runner = runner(model, config, self.device)
        self._data = BatchStream(stream(config.seed, "data"), self.device)
        self._nonfinite = 0
        self._stopping = False
        self._phase: Phase | None = None
        self._resumed: Mapping[str, Any] | None = None

    # -- training ------------------------------------------------------------------------------

    def fit(self, task: Task | Mixture, steps: int) -> PhaseReport:
        """Train for ``steps`` optimizer steps on batches of ``task``.

        After :meth:`load` the first call continues where the checkpoint was taken, or begins with
        another task where the checkpoint had finished its own.

        Raises:
            NonFiniteLossError: ``max_nonfinite`` batches in a row had no finite loss.
            TrainingStopped: ``stop`` asked for it; a checkpoint has been written.
            ValueError: ``steps`` is no positive integer, or the task is not the checkpoint's.
            OSError: a checkpoint could not be written.
        """
        if steps < 1 or steps != int(steps):
            raise ValueError(f"steps (={steps}) must be an integer of at least 1.")
        phase = self._begin(task, steps)
        self._phase, self._resumed = phase, None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.train()
        if self.step == 0:
            write_first_snapshot(self.manager, self.writer, self.device)
        if self.manager is not None and self.config.decide_until < 1.0:
            decided = int(self.config.decide_until * steps)
            self.manager.freeze_after = self.step - phase.done + decided
        self._call("on_fit_start", task, steps)
        self._runner.begin(self.optimizer)
        with progress_bar(self, phase) as bar:
            while phase.done < steps:
                loss, tokens = self._one_step(task, phase.done, steps)
                phase.count(loss, tokens)
                topology = self._topology_step()
                if topology is not None:
                    phase.report.topology_seconds += topology.overhead_s
                    if topology.swap_rate is not None:
                        phase.report.swap_rates.append(topology.swap_rate)
                self._call("on_step", self.step)
                self._after_step(phase, bar)
        report = phase.update_report()
        report.peak_memory_bytes = peak_memory_bytes(self.device)
        self._phase = None
        self._call("on_fit_end", report)
        return report

    def _begin(self, task: Task | Mixture, steps: int) -> Phase:
        resumed, window = self._resumed, self.config.log_every
        if resumed is None:
            return Phase(task, steps, window)
        finished = resumed["done"] == resumed["report"]["steps"]
        if finished and resumed["report"]["task"] != task.name:
            return Phase(task, steps, window)
        return Phase.resumed(resumed, task, steps, window)

    def _after_step(self, phase: Phase, bar: Any) -> None:
        """Everything but learning: log, evaluate, save, stop."""
        config, finished = self.config, phase.done == phase.report.steps
        if self.step % config.log_every == 0 or finished:
            log_progress(self, phase, bar)
        bar.update()
        if config.eval_every and phase.done % config.eval_every == 0:
            evaluate_in_between(self, phase)
        due = self.checkpoint_every and self.step % self.checkpoint_every == 0
        if due or finished or self._stopping:
            self.save()
        if self._stopping and not finished:
            raise TrainingStopped(f"stopped after step {self.step}")

    def _one_step(self, task: Task | Mixture, done: int, steps: int) -> tuple[float, int]:
        """One optimizer step; batches without a finite loss and gradient are passed over."""
        set_rate(self.optimizer, lambda peak: self.config.lr_at(done, steps, peak=peak))
        size_of_batch = self.config.batch_size, self.config.seq_len
        while True:
            batch = self._data.next(task, *size_of_batch)
            self.optimizer.zero_grad()
            loss = self._agree(self._runner.backward(batch, self.optimizer))
            self._call("on_backward", loss)
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.grad_clip or float("inf")
            )
            both = torch.stack((loss, norm.float()))
            if done + 1 < steps:
                self._data.draw_ahead(task, *size_of_batch)
            value, size = both.tolist()
            finite = math.isfinite(value) and math.isfinite(size)
            if finite and hasattr(self.optimizer, "record_loss"):
                self.optimizer.record_loss(value)  # finds loss spikes at decisions
            self._runner.step(self.optimizer, finite=finite)
            if finite:
                self._nonfinite = 0
                self.step += 1
                return value, batch.input_ids.numel()
            self._nonfinite += 1
            if self._nonfinite >= self.config.max_nonfinite:
                raise NonFiniteLossError(
                    f"no finite loss and gradient in {self._nonfinite} batches in a row after step "
                    f"{self.step} (loss {value}, gradient norm {size}, lr "
                    f"{self.optimizer.param_groups[0]['lr']:.2e}); lower lr, lengthen "
                    "warmup_steps or lower grad_clip."
                )

    def _agree(self, loss: Tensor) -> Tensor:
        """The sum of the processes' shares of the loss; on the way, whether one wants to stop."""
        if world_size() == 1:
            self._stopping = self.stop()
            return loss
        shares = torch.stack((loss, loss.new_tensor(float(self.stop()))))
        total = sum_over_processes(shares)
        self._stopping = bool(total[1] > 0)
        return total[0]

    def _topology_step(self) -> StepReport | None:
        if self._optimizer_drives:
            last = self.optimizer.last_report  # type: ignore[attr-defined]
            report: StepReport | None = last.topology
            return report
        return None if self.manager is None else self.manager.step()

    def _call(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *arguments)

    # -- records -------------------------------------------------------------------------------

    def record_into(self, writer: SnapshotWriter) -> None:
        """Record the run from now on, as with ``writer`` given from the beginning."""
        self.writer = writer
        self.add_logger(writer)

    def add_logger(self, logger: Logger) -> None:
        """Another receiver of metrics, from now on."""
        self._logger.loggers = (*self._logger.loggers, logger)
        self._tell_manager()

    def _tell_manager(self) -> None:
        if self.manager is not None:
            self.manager.writer = self.writer
            # without anybody to tell, a decision computes no metrics
            self.manager.logger = self._logger if self._logger.loggers else None

    def log(self, metrics: Mapping[str, float]) -> None:
        """Hand metrics to ``writer`` and ``loggers``, at the present step."""
        self._logger.log(metrics, self.step)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint; all processes must call this. Returns its path in process 0.

        Nothing without ``checkpoints``.

        Raises:
            OSError: it could not be written; older checkpoints are as they were.
        """
        if self.checkpoints is None:
            return None
        if self._phase is None:
            return self._save()
        with self._phase.watch.doing("checkpoint"):
            return self._save()

    def _save(self) -> Path | None:
        assert self.checkpoints is not None
        state = trainer_state(self)
        if rank() != 0:
            return None
        model, training = self.model.config.to_dict(), self.config.to_dict()
        info = {"model": model, "training": training, **self.info}
        return self.checkpoints.save(self.step, self.model, state=state, info=info)

    def check_continues(self, task: Task | Mixture, steps: int) -> None:
        """Raise ``ValueError`` unless ``task`` is what the loaded checkpoint was trained on."""
        if self._resumed is not None:
            Phase.resumed(self._resumed, task, steps, 1)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint's directory: the next :meth:`fit` goes on where it was taken.

        Raises:
            ValueError: it is damaged, or belongs to another configuration; the message says what
                is wrong or which fields differ.
        """
        load_trainer_state(self, read_training_checkpoint(path))
