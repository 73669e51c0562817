"""Meta-learning of the nested networks: Adam on the gradient of a loss after unrolled steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._controller import ControllerState
from ._momentum import DeepMomentumStep
from ._unroll import LossFunction, unrolled_loss

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


@dataclass(frozen=True)
class MetaReport:
    """What one `meta_update` did."""

    val_loss: float
    """Validation loss after the unrolled steps, before the nested networks changed."""
    steps: int
    """Unrolled steps k."""
    gradient_norms: dict[str, float]
    """Length of the gradient that reached each nested network."""


def nested_networks(
    deep_momentum: DeepMomentumStep | None, controller: ControllerState | None
) -> dict[str, list[Tensor]]:
    """Weights of the networks that are on, by name."""
    found = {}
    if deep_momentum is not None:
        found["deep_momentum"] = [w for net in deep_momentum.weights for w in net.values()]
    if controller is not None:
        found["controller"] = list(controller.weights.values())
    return found


class MetaLearner:
    """Trains the nested networks of one optimizer.

    Args:
        networks: weights by name of the network.
        lr: Adam's learning rate.
    """

    def __init__(self, networks: Mapping[str, Sequence[Tensor]], lr: float) -> None:
        self.networks = networks
        self._weights = [weight for network in networks.values() for weight in network]
        self._adam = torch.optim.Adam(self._weights, lr=lr)

    def update(
        self,
        optimizer: DeepNestedOptimizer,
        val_batch: Any,
        train_batches: Sequence[Any],
        *,
        loss_fn: LossFunction | None,
        second_order: bool,
    ) -> MetaReport:
        """See `DeepNestedOptimizer.meta_update`."""
        if optimizer.model is None:
            raise ValueError(
                "meta_update (optimizer made from parameters) needs the model to unroll; pass the "
                "model as params_or_model."
            )
        if not train_batches:
            raise ValueError("train_batches (=[]) must hold at least one batch.")
        loss = unrolled_loss(
            optimizer, val_batch, train_batches, loss_fn=loss_fn, second_order=second_order
        )
        slopes = torch.autograd.grad(loss, self._weights, allow_unused=True)
        for weight, slope in zip(self._weights, slopes, strict=True):
            weight.grad = torch.zeros_like(weight) if slope is None else slope
        self._average_over_ranks()
        norms = {
            name: float(torch.stack([w.grad.norm() for w in net if w.grad is not None]).norm())
            for name, net in self.networks.items()
        }
        # an unrolled step may overflow; the networks shall not suffer for it, on any rank
        if all(norm < float("inf") for norm in norms.values()):
            self._adam.step()
        self._adam.zero_grad()
        return MetaReport(float(loss.detach()), len(train_batches), norms)

    def _average_over_ranks(self) -> None:
        """Each process has its own batches; the networks have to stay the same on all."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, part in zip(
            gradients, together.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Adam's state, weight by weight; empty mappings before the first update."""
        states = [self._adam.state.get(weight, {}) for weight in self._weights]
        return [{key: value.clone() for key, value in state.items()} for state in states]

    def load_state_dict(self, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Continue where `saved` was taken."""
        self._adam.state.clear()
        for weight, state in zip(self._weights, saved, strict=True):
            if state:
                self._adam.state[weight] = {key: value.clone() for key, value in state.items()}
