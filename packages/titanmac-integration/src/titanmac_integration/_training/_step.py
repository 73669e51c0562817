"""Loss and gradients of one optimizer step: parts of a batch, precision, compilation, processes."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titanmac_integration._data._tasks import Batch
from titanmac_integration._labels import IGNORE_INDEX

from ._config import TrainingConfig
from ._processes import rank, world_size

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class WeightedPart(NamedTuple):
    """A part of a batch."""

    input_ids: Tensor
    """[sequences, tokens]."""
    labels: Tensor
    """[sequences, tokens]."""
    weight: float | None
    """Its share of the tokens that count; NaN if none does in the whole batch; None: it is all."""


class StepRunner:
    """Computes the gradient of the mean loss over all counted tokens of a batch.

    Every process is given the same batch and works on its rows, in ``accumulation_steps`` parts.
    A part weighs as much as it has tokens that count, so that neither the number of parts nor that
    of processes changes what is computed, except for rounding.

    Args:
        model: returns a dict with ``loss``, the mean over counted tokens, and ``logits``. One that
            takes ``return_logits`` is asked for the loss alone.
        config: settings.
        device: the model's.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._keeps_casts = True
        self._loss_alone = "return_logits" in inspect.signature(model.forward).parameters
        self._forward: Any = torch.compile(model) if config.compile else model
        if world_size() > 1:
            # buffers follow from averaged gradients and agree without being sent around
            known = inspect.signature(DistributedDataParallel).parameters
            name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
            options: dict[str, Any] = {name: False}
            self._forward = DistributedDataParallel(self._forward, **options)
        self.scaler: torch.amp.GradScaler | None = None
        """Of gradients in float16, whose range is small; None for other precisions."""
        if config.precision == "fp16":
            self.scaler = torch.amp.GradScaler(device.type)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first of a row of steps that nothing comes between."""

    def backward(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        """Leave the gradients in ``optimizer``'s parameters.

        Returns this process's share of the loss, 0-d: the sum of the shares is the batch's loss.

        Raises:
            ValueError: the batch has fewer sequences than there are parts.
        """
        loss = self._backward(self._weighted_parts(batch))
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return loss if loss.dtype == torch.float64 else loss.float()

    def _backward(self, parts: list[WeightedPart]) -> Tensor:
        loss: Tensor | None = None
        for last, part in ((i == len(parts) - 1, part) for i, part in enumerate(parts)):
            with self._without_averaging(last):
                value = self._part_loss(part)
                scaled = value * world_size() if world_size() > 1 else value
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            loss = value.detach() if loss is None else loss + value.detach()
        assert loss is not None
        return loss

    def _part_loss(self, part: WeightedPart) -> Tensor:
        """The part's share of the loss."""
        nothing = part.weight == 0  # its mean is not a number
        options = {"return_logits": False} if self._loss_alone and not nothing else {}
        output = self._output(
            self._to_device(part.input_ids), self._to_device(part.labels), options
        )
        if nothing:
            return output["logits"].float().sum() * 0.0
        loss: Tensor = output["loss"]
        return loss if part.weight is None else loss * part.weight

    def _output(self, input_ids: Tensor, labels: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        dtype = _AUTOCAST.get(self.config.precision)
        with torch.autocast(
            self.device.type, dtype, enabled=dtype is not None, cache_enabled=self._keeps_casts
        ):
            output: dict[str, Any] = self._forward(input_ids, labels, **options)
        return output

    def step(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Let the optimizer step, unless loss or gradients were not finite."""
        if self.scaler is None:
            if finite:
                optimizer.step()
            return
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()

    def _weighted_parts(self, batch: Batch) -> list[WeightedPart]:
        """This process's parts, weighted by the tokens that count."""
        parts = self._parts(batch)
        if len(parts) == world_size() == 1:
            return [WeightedPart(*parts[0], None)]
        total = _counted(batch.labels)
        return [
            WeightedPart(*part, _counted(part.labels) / total if total else math.nan)
            for part in parts
        ]

    def _parts(self, batch: Batch) -> list[Batch]:
        rows, wanted = len(batch.input_ids), world_size() * self.config.accumulation_steps
        if rows < wanted:
            raise ValueError(
                f"batch ({rows} sequences) must have at least one sequence for each of "
                f"{self.config.accumulation_steps} accumulation steps of {world_size()} processes; "
                "raise batch_size or lower accumulation_steps."
            )
        if wanted == 1:
            return [batch]
        mine = range(
            rank() * self.config.accumulation_steps, (rank() + 1) * self.config.accumulation_steps
        )
        split = zip(*(tensor.tensor_split(wanted) for tensor in batch), strict=True)
        parts = [Batch(*tensors) for tensors in split]
        return [parts[i] for i in mine]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def _without_averaging(self, last: bool) -> Iterator[None]:
        """Processes average their gradients in the last part only."""
        if world_size() > 1 and not last:
            with self._forward.no_sync():
                yield
        else:
            yield


def _counted(labels: Tensor) -> int:
    """Tokens whose prediction counts; the first of a sequence is never predicted."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
