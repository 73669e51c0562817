"""A callback that runs the topology in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same classes under their older name
    from pytorch_lightning import Callback, LightningModule, Trainer

from cms_topology import TopologyManager

from ._state import check_undriven


class LightningTopologyCallback(Callback):
    """Scores and moves the blocks of a module's `CMSBlockLinear` layers under Lightning's Trainer.

    ```python
    callback = LightningTopologyCallback(periods=(1, 10, 100))
    Trainer(max_steps=1000, callbacks=[callback]).fit(module, data)
    ```

    The clock counts optimizer steps, whatever the gradient accumulation. Its state is in the
    trainer's checkpoints and is put back by `fit(..., ckpt_path=...)`. For automatic optimization;
    in manual optimization call `callback.manager.step()` after the optimizer's step.

    Args:
        periods: optimizer steps between accumulating, folding and deciding.
        seed: of exploration and new weights.
        **options: further arguments of `cms_topology.TopologyManager` (writer, logger, ...).
    """

    def __init__(
        self, periods: tuple[int, int, int] = (1, 10, 100), seed: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self._settings = {"periods": periods, "seed": seed, **options}
        self.manager: TopologyManager | None = None
        """Made when training begins."""
        self._loaded: dict[str, Any] | None = None
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; where training is resumed, put the clock back."""
        for optimizer in trainer.optimizers:
            check_undriven(optimizer)
        self.manager = TopologyManager(pl_module, trainer.optimizers, **self._settings)
        self._last_step = trainer.global_step
        if self._loaded is not None:
            self.manager.load_state_dict(self._loaded)
            self._loaded = None
        else:
            self.manager.write_snapshot()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the clock if the optimizer has stepped; Lightning keeps gradients until then."""
        if trainer.global_step == self._last_step or not pl_module.automatic_optimization:
            return
        self._last_step = trainer.global_step
        assert self.manager is not None
        self.manager.step()

    def state_dict(self) -> dict[str, Any]:
        """The clock's state, for Lightning's checkpoints."""
        return {} if self.manager is None else self.manager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the layers are known."""
        self._loaded = dict(state_dict) or None
