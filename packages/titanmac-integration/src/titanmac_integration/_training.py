"""The training loop: AdamW, and the topology at the levels of the clock."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blockell_format.snapshots import SnapshotWriter
from cms_topology import StepReport, TopologyManager

from ._model import TitanMAC
from ._seeding import stream
from ._tasks import Mixture, Task
from ._training_config import TrainingConfig


class NonFiniteLossError(RuntimeError):
    """Loss or gradients were infinite or NaN for many batches in a row."""


@dataclass
class PhaseReport:
    """What training on one task (or mixture) did."""

    task: str
    """Name of the task."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall time of training, evaluations not counted."""
    eval_seconds: float
    """Wall time of the evaluations in between."""
    topology_seconds: float
    """Host time that topology work took, part of ``seconds``."""
    tokens: int
    """Training tokens seen."""
    final_loss: float
    """Mean training loss of the last steps, in nats."""
    swap_rates: list[float] = field(default_factory=list)
    """Share of all live blocks swapped, per topology decision."""


class TrainerCallback:
    """What :class:`Trainer` tells its callbacks. Deriving from this class is not required."""

    def on_fit_start(self, trainer: "Trainer", task: Task | Mixture, steps: int) -> None:
        """Before the first of ``steps`` optimizer steps on ``task``."""

    def on_backward(self, trainer: "Trainer", loss: Tensor) -> None:
        """The gradients of a whole step are there, not yet clipped; they may be changed.

        ``loss`` is the step's loss, a scalar without graph.
        """

    def on_step(self, trainer: "Trainer", step: int) -> None:
        """After the optimizer and the topology; the gradients are still there."""

    def on_fit_end(self, trainer: "Trainer", report: PhaseReport) -> None:
        """After the last step on a task."""


class Trainer:
    """Trains one model on one task after another, with one optimizer and one clock throughout.

    The same model, settings and tasks give the same result to the bit on one machine and thread
    count. Each call of :meth:`fit` has its own learning-rate schedule.

    Args:
        model: the model; it stays on its device.
        config: settings.
        writer: receives metrics, and a snapshot at the start and at every topology decision.
        eval_tasks: evaluated every ``config.eval_every`` steps.
        progress: whether a progress bar is shown on standard error.
        label: what the progress bar calls the model.
        optimizer: a ready optimizer of the model's parameters. Its groups' learning rates are the
            peaks of the schedule; ``config.lr``, betas and weight decay are not used. Default:
            AdamW with the settings of ``config``.
        callbacks: called at the events of :class:`TrainerCallback`, in this order; an object needs
            only the methods that it uses.
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
    ) -> None:
        config.check_fits(model.config)
        self.model, self.config = model, config
        self.writer, self.eval_tasks = writer, tuple(eval_tasks)
        self.progress, self.label = progress, label
        self.device = next(model.parameters()).device
        self.callbacks = tuple(callbacks)
        self.optimizer: torch.optim.Optimizer = optimizer or torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # torch's schedulers use this key, too
        self.manager: TopologyManager | None = None
        if model.block_sparse_layers:
            self.manager = TopologyManager(
                model,
                self.optimizer,
                periods=config.level_periods,
                seed=config.seed,
                writer=writer,
                logger=writer,
            )
            self.manager.write_snapshot()
        self.step = 0
        """Optimizer steps so far."""
        self._data = stream(config.seed, "data")
        self._nonfinite = 0

    def fit(self, task: Task | Mixture, steps: int) -> PhaseReport:
        """Train for ``steps`` optimizer steps on batches of ``task``.

        Raises:
            NonFiniteLossError: ``max_nonfinite`` batches in a row had no finite loss.
            ValueError: ``steps`` is not positive.
        """
        if steps < 1:
            raise ValueError(f"steps (={steps}) must be at least 1.")
        self.model.train()
        self._call("on_fit_start", task, steps)
        report = PhaseReport(task.name, steps, 0.0, 0.0, 0.0, 0, float("nan"))
        overhead = self.manager.overhead_seconds if self.manager else 0.0
        recent: deque[float] = deque(maxlen=self.config.log_every)
        started = time.perf_counter()
        with self._bar(task.name, steps) as bar:
            for done in range(steps):
                loss, tokens = self._one_step(task, done, steps)
                topology = self._topology_step(report)
                self._call("on_step", self.step)
                recent.append(loss)
                report.tokens += tokens
                spent = time.perf_counter() - started - report.eval_seconds
                if self.step % self.config.log_every == 0 or done + 1 == steps:
                    self._log(bar, fmean(recent), report.tokens / spent, topology)
                bar.update()
                if self.config.eval_every and (done + 1) % self.config.eval_every == 0:
                    report.eval_seconds += self._evaluate_in_between()
        report.seconds = time.perf_counter() - started - report.eval_seconds
        report.topology_seconds = self.manager.overhead_seconds - overhead if self.manager else 0.0
        report.final_loss = fmean(recent)
        self._call("on_fit_end", report)
        return report

    def _call(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *arguments)

    def _one_step(self, task: Task | Mixture, done: int, steps: int) -> tuple[float, int]:
        """One optimizer step; batches without a finite loss and gradient are passed over."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(done, steps, peak=group["initial_lr"])
        while True:
            batch = task.batch(self.config.batch_size, self.config.seq_len, self._data)
            inputs, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
            self.optimizer.zero_grad()
            loss: Tensor = self.model(inputs, labels)["loss"]
            loss.backward()
            self._call("on_backward", loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.grad_clip or float("inf")
            )
            value = loss.item()
            if torch.isfinite(loss + norm):
                self._nonfinite = 0
                self.optimizer.step()
                self.step += 1
                return value, inputs.numel()
            self._nonfinite += 1
            if self._nonfinite >= self.config.max_nonfinite:
                raise NonFiniteLossError(
                    f"no finite loss and gradient in {self._nonfinite} batches in a row after step "
                    f"{self.step} (loss {value}, gradient norm {norm.item()}, lr "
                    f"{self.optimizer.param_groups[0]['lr']:.2e}); lower lr, lengthen "
                    "warmup_steps or lower grad_clip."
                )

    def _topology_step(self, report: PhaseReport) -> StepReport | None:
        if self.manager is None:
            return None
        outcome = self.manager.step()
        if outcome.swap_rate is not None:
            report.swap_rates.append(outcome.swap_rate)
        return outcome

    def _log(self, bar: Any, loss: float, tokens_per_s: float, topology: StepReport | None) -> None:
        shown = {"loss": f"{loss:.3f}", "tok/s": f"{tokens_per_s:,.0f}"}
        if self.manager is not None and self.manager.swap_rate is not None:
            shown["swap"] = f"{self.manager.swap_rate:.1%}"
        bar.set_postfix(shown, refresh=False)
        if self.writer is not None:
            metrics = {
                "train/loss": loss,
                "train/tokens_per_s": tokens_per_s,
                "train/lr": self.optimizer.param_groups[0]["lr"],
            }
            self.writer.log(metrics, self.step)

    def _evaluate_in_between(self) -> float:
        """Log the measure of every evaluation task; returns the seconds it took."""
        started = time.perf_counter()
        metrics = {f"eval/{t.name}/{t.metric}": t.evaluate(self.model) for t in self.eval_tasks}
        if self.writer is not None:
            self.writer.log(metrics, self.step)
        return time.perf_counter() - started

    def _bar(self, task: str, steps: int) -> Any:
        name = f"{self.label} {task}".strip()
        return tqdm(total=steps, desc=name, unit="step", disable=not self.progress, leave=True)
