"""A run directory for one method: metrics and snapshots over all tasks, for the dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from blockell_format.snapshots import LayerInfo, SnapshotWriter
from titanmac_integration._model._checkpoint import save_checkpoint
from titanmac_integration._model._titanmac import TitanMAC
from titanmac_integration._training._trainer import Trainer, TrainerCallback


class Recording(TrainerCallback):
    """Records every training of one model into a run directory, and the model itself at the end.

    A callback of the trainers, and a context manager. Where the topology makes no decisions it
    writes a snapshot at every slow period all the same.

    Args:
        directory: of the run; must not hold one.
        model: any model with the layers that will be trained.
        config: anything JSON can hold.
    """

    def __init__(self, directory: Path, model: TitanMAC, config: Mapping[str, Any]) -> None:
        layers = [
            LayerInfo(name=name, R=x.R, C=x.C, K=x.K, B=x.B, row_group=x.row_group)
            for name, x in model.block_sparse_layers.items()
        ]
        self.directory = directory
        self.writer = SnapshotWriter(directory, layers=layers, config=config)
        self.model = model
        """The model whose weights are saved at the end: the one trained last."""
        self.step = 0
        """Optimizer steps recorded so far, over all trainings."""

    def attach(self, trainer: Trainer) -> None:
        """Let a new trainer count its steps on from those recorded."""
        self.model = trainer.model
        if self.step and trainer.manager is not None:
            trainer.manager.load_state_dict({**trainer.manager.state_dict(), "step": self.step})
        trainer.step = self.step

    def on_step(self, trainer: Trainer, step: int) -> None:
        self.step = step
        manager = trainer.manager
        period = trainer.config.level_periods[2]
        if manager is None or step % period or manager.freeze_after is None:
            return
        if step > manager.freeze_after:
            manager.write_snapshot()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.close()
        if self.step:
            save_checkpoint(self.model, self.directory, info={"step": self.step})
