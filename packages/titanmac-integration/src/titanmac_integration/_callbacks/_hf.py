"""A callback that runs the topology in Hugging Face's Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cms_topology import TopologyManager
from titanmac_integration._training._optimizer import check_no_closure

from ._state import check_undriven, read_manager_state, write_manager_state

logger = logging.getLogger(__name__)


class HuggingFaceTopologyCallback(TrainerCallback):
    """Scores and moves the blocks of a model's sparse layers under `transformers.Trainer`.

    ```python
    callback = HuggingFaceTopologyCallback(periods=(1, 10, 100))
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    ```

    The clock counts optimizer steps, whatever the gradient accumulation. The clock's state is in
    every checkpoint of the trainer (`topology_manager.json`; scores and ages are in the model's own
    file) and is put back by `train(resume_from_checkpoint=...)`.

    Args:
        periods: optimizer steps between accumulating, folding and deciding.
        seed: of exploration and new weights.
        **options: further arguments of `cms_topology.TopologyManager` (writer, logger, ...).
    """

    def __init__(
        self, periods: tuple[int, int, int] = (1, 10, 100), seed: int = 0, **options: Any
    ) -> None:
        self._settings = {"periods": periods, "seed": seed, **options}
        self.manager: TopologyManager | None = None
        """Made when training begins."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the layers; where training is resumed, put the clock back."""
        assert model is not None
        check_undriven(_unwrapped(optimizer))
        if optimizer is not None:
            check_no_closure(_unwrapped(optimizer))
        self.manager = TopologyManager(model, _unwrapped(optimizer), **self._settings)
        if state.global_step > 0:
            self._resume(args, state.global_step)
        else:
            self.manager.write_snapshot()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Advance the clock: the optimizer has stepped and the gradients are still there."""
        assert self.manager is not None
        # a gradient scaler leaves out steps whose gradients are not finite
        if not getattr(optimizer, "step_was_skipped", False):
            self.manager.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the clock's state beside the trainer's."""
        if self.manager is not None and state.is_world_process_zero:
            directory = _checkpoint(args, state.global_step)
            write_manager_state(directory, self.manager.state_dict())

    def _resume(self, args: TrainingArguments, step: int) -> None:
        assert self.manager is not None
        given = args.resume_from_checkpoint
        places = [Path(given)] if isinstance(given, str) and Path(given).is_dir() else []
        for directory in (*places, _checkpoint(args, step)):
            state = read_manager_state(directory)
            if state is not None:
                self.manager.load_state_dict(state)
                return
        logger.warning(
            "no topology state in %s: the clock goes on from step %d, newborn blocks are taken for "
            "grown-up ones",
            _checkpoint(args, step),
            step,
        )
        self.manager.load_state_dict({**self.manager.state_dict(), "step": step})


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{step}"


def _unwrapped(optimizer: Any) -> Any:
    """Accelerate's wrapper hides the class of the optimizer."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
