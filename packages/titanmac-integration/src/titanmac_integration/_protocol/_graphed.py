"""Training whose step is captured in a CUDA graph: small models are bound by their launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cms_topology import GraphedBackward
from titanmac_integration._data._tasks import Mixture, Task
from titanmac_integration._model._titanmac import TitanMAC
from titanmac_integration._training._config import TrainingConfig
from titanmac_integration._training._trainer import NonFiniteLossError, Trainer

LOSS_EVERY = 50


class GraphedTrainer(Trainer):
    """A :class:`Trainer` that captures loss, gradients and AdamW's step, and replays them.

    ``on_backward`` is captured with them and so must not wait for the device; hooks of the
    optimizer are not replayed (``on_step`` is called as usual). The topology must stay as it is:
    with decisions to make, and on a CPU, every step runs the plain way. The loss is looked at every
    50 steps only. Takes no ready optimizer, no mixed precision, no accumulation.
    """

    def __init__(self, model: TitanMAC, config: TrainingConfig, **options: Any) -> None:
        device = next(model.parameters()).device
        if device.type == "cuda":
            options["optimizer"] = torch.optim.AdamW(
                model.parameters(),
                lr=torch.tensor(config.lr, device=device),  # a graph reads it anew at every replay
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                capturable=True,
                foreach=True,
            )
        super().__init__(model, config, **options)
        self.generators: list[torch.Generator] = []
        """CUDA generators that ``on_backward`` draws from."""
        self._work: GraphedBackward | None = None
        self._value = math.nan

    @property
    def graphed(self) -> bool:
        """Whether steps are captured."""
        return self.device.type == "cuda" and self.manager is None

    def _one_step(self, task: Task | Mixture, done: int, steps: int) -> tuple[float, int]:
        lr = self.config.lr_at(done, steps)
        if not self.graphed:
            if self.device.type == "cuda":
                for group in self.optimizer.param_groups:
                    group["initial_lr"] = self.config.lr
            return super()._one_step(task, done, steps)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        if self._work is None:
            self._work = GraphedBackward(self._captured, self.model, generators=self.generators)
        batch = self._data.next(task, self.config.batch_size, self.config.seq_len)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._work(batch.input_ids, batch.labels)
        self.step += 1
        if done % LOSS_EVERY == 0 or done + 1 == steps:
            self._value = loss.item()
            if not math.isfinite(self._value):
                raise NonFiniteLossError(
                    f"no finite loss at step {self.step} (lr {lr:.2e}); lower lr, lengthen "
                    "warmup_steps or lower grad_clip."
                )
        return self._value, batch.input_ids.numel()

    def _captured(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids, labels)["loss"]
        loss.backward()
        self._call("on_backward", loss.detach())
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return loss
