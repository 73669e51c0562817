"""Training steps replayed from CUDA graphs."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import GraphedBackward
from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._labels import IGNORE_INDEX

from ._config import TrainingConfig
from ._graphed_update import GraphedUpdate
from ._processes import world_size
from ._step import StepRunner, WeightedPart


class GraphedStepRunner(StepRunner):
    """A :class:`StepRunner` that replays loss and gradients, and where it can the update, too.

    Between the two the host still sees loss and gradients: batches without a finite loss are passed
    over, callbacks and hooks act as they do otherwise. The update is replayed for fused Adam and
    AdamW without hooks; other optimizers step as they are. Every shape of batch needs a graph:
    where lengths vary, batches are padded behind their ends, which changes rounding only.

    Raises:
        ValueError: the model is not on a CUDA device, or there are several processes.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> None:
        check_place(device)
        super().__init__(model, config, device)
        self._keeps_casts = False  # copies of weights made in one step would serve all others
        self._graphed = GraphedBackward(self._captured, model)
        self._update: GraphedUpdate | None = None
        self._lengths: dict[int, list[int]] = {}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget what was captured: model or optimizer may have been changed since."""
        self._graphed.forget()
        self._lengths = {}
        self._update = GraphedUpdate(optimizer) if GraphedUpdate.fits(optimizer) else None

    def _backward(self, parts: list[WeightedPart]) -> Tensor:
        if any(part.weight == 0 for part in parts):
            loss = super()._backward(parts)
        else:
            loss = self._graphed(*_tensors([self._padded(part) for part in parts]))
        if self._update is not None:
            self._update.look()
        return loss

    def _padded(self, part: WeightedPart) -> WeightedPart:
        """As long as the first of so many sequences, if it is not longer, else ``seq_len``."""
        rows, length = part.input_ids.shape
        known = self._lengths.setdefault(rows, [length])
        goal = min((n for n in known if n >= length), default=max(length, self.config.seq_len))
        if goal not in known:
            known.append(goal)
        if goal == length:
            return part
        behind = (0, goal - length)
        return part._replace(
            input_ids=functional.pad(part.input_ids, behind),
            labels=functional.pad(part.labels, behind, value=IGNORE_INDEX),
        )

    def _captured(self, *inputs: Tensor) -> Tensor:
        """`StepRunner._backward` of tensors alone: ids, labels and, of several parts, weights."""
        whole = len(inputs) == 2
        size = 2 if whole else 3
        options = {"return_logits": False} if self._loss_alone else {}
        loss: Tensor | None = None
        for start in range(0, len(inputs), size):
            input_ids, labels, *weight = inputs[start : start + size]
            value: Tensor = self._output(input_ids, labels, options)["loss"]
            value = value if whole else value * weight[0]
            value.backward()
            loss = value.detach() if loss is None else loss + value.detach()
        assert loss is not None
        return loss

    def step(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Let the optimizer step, unless loss or gradients were not finite."""
        if self._update is None or not finite:
            super().step(optimizer, finite=finite)
        else:
            self._update.step()


def _tensors(parts: list[WeightedPart]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for part in parts:
        tensors += [part.input_ids, part.labels]
        if part.weight is not None:
            tensors.append(torch.tensor(part.weight))
    return tensors


def can_be_graphed(config: TrainingConfig, model: TitanMACConfig, device: torch.device) -> bool:
    """Whether steps of such a model can be replayed there, with settings that are else the same."""
    try:
        check_place(device)
        dataclasses.replace(config, cuda_graph=True).check_fits(model)
    except ValueError:
        return False
    return True


def check_place(device: torch.device) -> None:
    """Raise ``ValueError`` where steps cannot be captured."""
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graph (=True) needs a model on a CUDA device, and this one is on {device}; "
            "choose one with device, or switch cuda_graph off."
        )
    if world_size() > 1:
        raise ValueError(
            f"cuda_graph (=True) needs a single process, and there are {world_size()}; switch "
            "it off."
        )
