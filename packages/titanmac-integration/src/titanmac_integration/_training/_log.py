"""What a training shows and records while it runs."""

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from blockell_format.snapshots import SnapshotWriter
from cms_topology import TopologyManager

from ._phase import Phase
from ._processes import gather_bytes, rank
from ._report import peak_memory_bytes

if TYPE_CHECKING:
    from ._trainer import Trainer


def write_first_snapshot(
    manager: TopologyManager | None, writer: SnapshotWriter | None, device: torch.device
) -> None:
    """Record the topology before the first step, with every process's checksums."""
    if manager is None:
        return
    mine = [layer.topology_checksum() for layer in manager.layers.values()]
    every = [data.decode().split() for data in gather_bytes(" ".join(mine).encode(), device)]
    if writer is None:
        return
    per_layer = zip(*every, strict=True)
    writer.write(
        manager.global_step,
        manager.snapshot(),
        checksums={n: list(s) for n, s in zip(manager.layers, per_layer, strict=True)},
        swap_counts=dict.fromkeys(manager.layers, 0),
    )


def progress_bar(trainer: "Trainer", phase: Phase) -> Any:
    """A bar that begins where a resumed phase does; silent unless the trainer shows progress."""
    return tqdm(
        total=phase.report.steps,
        initial=phase.done,
        desc=f"{trainer.label} {phase.report.task}".strip(),
        unit="step",
        disable=not trainer.progress,
        leave=True,
    )


def log_progress(trainer: "Trainer", phase: Phase, bar: Any) -> None:
    """Loss, speed, learning rate, share of topology work, memory."""
    loss, speed = fmean(phase.recent), phase.tokens_per_second()
    shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
    rate = trainer.manager.swap_rate if trainer.manager is not None else None
    if rate is not None:
        shown["swap"] = f"{rate:.1%}"
    bar.set_postfix(shown, refresh=False)
    metrics = {
        "train/loss": loss,
        "train/tokens_per_s": speed,
        "train/lr": float(trainer.optimizer.param_groups[0]["lr"]),
        "train/topology_frac": phase.update_report().topology_frac,
        "train/peak_memory_bytes": peak_memory_bytes(trainer.device),
    }
    trainer.log(metrics)


def evaluate_in_between(trainer: "Trainer", phase: Phase) -> None:
    """Log the measure of every evaluation task, in process 0, if there is time for it."""
    if rank() != 0 or not phase.watch.evaluation_fits(trainer.config.eval_max_frac):
        return
    with phase.watch.doing("evaluation"):
        tasks = trainer.eval_tasks
        trainer.log({f"eval/{t.name}/{t.metric}": t.evaluate(trainer.model) for t in tasks})
