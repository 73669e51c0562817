"""The optimizer's steps, unrolled differentiably, so that gradients reach the nested networks.

Legend: k unrolled steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from cms_topology import CMSBlockLinear

from . import _controller, _momentum
from ._levels import ACCUMULATED

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer

LossFunction = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Loss of a batch: `model(**batch)` or `model(*batch)`, its "loss" if it returns a mapping."""
    if not isinstance(batch, (Mapping, Sequence)):
        raise TypeError(
            f"batch (a {type(batch).__name__}) must be a mapping or a sequence of the model's "
            "arguments, for example (input_ids, labels); or pass loss_fn."
        )
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    return output["loss"] if isinstance(output, Mapping) else output


class _Loss(nn.Module):
    """Loss as a module, so that `functional_call` can exchange the model's parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


@dataclass
class _Particle:
    """One parameter on its way through the unrolled steps."""

    name: str
    group: int
    value: Tensor
    first: Tensor
    second: Tensor
    step: float
    total: Tensor | None
    """Gradients accumulated by a slow level."""


def unrolled_loss(
    optimizer: DeepNestedOptimizer,
    val_batch: Any,
    train_batches: Sequence[Any],
    *,
    loss_fn: LossFunction | None = None,
    second_order: bool = True,
) -> Tensor:
    """Validation loss after one step on each training batch, differentiable in the nested networks.

    The steps are those `optimizer.step()` would take from here, slow levels included, except that
    the topology stands still, the momentum network does not learn on the way, and the controller
    looks at every step. Nothing is changed: parameters, state and buffers are as before.

    Args:
        optimizer: its model, state and nested networks.
        val_batch: whatever `loss_fn` takes.
        train_batches: the same, one per unrolled step.
        loss_fn: `(model, batch) -> scalar`. Default: see `default_loss`.
        second_order: differentiate through the training gradients, too (exact); False takes them
            as constants, which costs a fraction of the memory and time.
    """
    model = optimizer.model
    assert model is not None
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its reducer would wait for gradients that never come
    wrapped = _Loss(model, loss_fn or default_loss)
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    particles = _particles(optimizer, wrapped)
    fixed = {name: p.detach() for name, p in wrapped.named_parameters() if not p.requires_grad}

    def loss_of(batch: Any, values: Sequence[Tensor]) -> Tensor:
        named = {particle.name: v for particle, v in zip(particles, values, strict=True)}
        # tied weights are exchanged in every place where they are used
        loss = torch.func.functional_call(wrapped, {**fixed, **buffers, **named}, (batch,))
        if loss.ndim:
            raise ValueError(f"loss_fn (shape {tuple(loss.shape)}) must return a scalar loss.")
        return loss

    with _twice_differentiable(model), torch.enable_grad():
        for number, batch in enumerate(train_batches, start=optimizer.global_step + 1):
            # Aliases, so that the gradient is this step's alone: a slow parameter is the same
            # tensor as in the step before, whose update of the fast ones depends on it, too.
            aliases = [particle.value.view_as(particle.value) for particle in particles]
            gradients = torch.autograd.grad(
                loss_of(batch, aliases), aliases, create_graph=second_order, allow_unused=True
            )
            _advance(optimizer, particles, gradients, number)
        return loss_of(val_batch, [particle.value for particle in particles])


def _particles(optimizer: DeepNestedOptimizer, wrapped: nn.Module) -> list[_Particle]:
    names = {p: name for name, p in wrapped.named_parameters()}
    particles = []
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p not in names:
                raise ValueError(
                    "meta_update needs every parameter of the optimizer in its model; one of shape "
                    f"{tuple(p.shape)} is not."
                )
            state = optimizer.state.get(p, {})  # .get makes no entry
            zeros = torch.zeros_like(p)
            total = state.get(ACCUMULATED)
            particles.append(
                _Particle(
                    name=names[p],
                    group=index,
                    value=p.detach().clone().requires_grad_(),
                    first=state.get("exp_avg", zeros).detach().clone(),
                    second=state.get("exp_avg_sq", zeros).detach().clone(),
                    step=float(state.get("step", 0.0)),
                    total=None if total is None else total.clone(),
                )
            )
    return particles


def _advance(
    optimizer: DeepNestedOptimizer,
    particles: Sequence[_Particle],
    gradients: Sequence[Tensor | None],
    number: int,
) -> None:
    """One differentiable step of every parameter that is due at step `number`."""
    moving: dict[int, list[tuple[_Particle, Tensor]]] = {}
    for particle, gradient in zip(particles, gradients, strict=True):
        period = optimizer.param_groups[particle.group]["period"]
        if period > 1:
            if gradient is not None:
                particle.total = gradient if particle.total is None else particle.total + gradient
            gradient = None
            if number % period == 0 and particle.total is not None:
                gradient, particle.total = particle.total / period, None
        if gradient is not None:
            if optimizer.param_groups[particle.group]["maximize"]:
                gradient = -gradient
            moving.setdefault(particle.group, []).append((particle, gradient))
    for index, pairs in moving.items():
        _advance_group(optimizer, index, pairs)


def _advance_group(
    optimizer: DeepNestedOptimizer, index: int, pairs: Sequence[tuple[_Particle, Tensor]]
) -> None:
    group = optimizer.param_groups[index]
    beta1, beta2 = group["betas"]
    lr: Any = group["lr"] * group["lr_scale"]
    controller, memory = optimizer.controller, optimizer.deep_momentum
    if controller is not None and any(particle.step > 0 for particle, _ in pairs):
        row = _controller.statistics(
            [gradient for _, gradient in pairs],
            [particle.value for particle, _ in pairs],
            [particle.first for particle, _ in pairs],
            [particle.second for particle, _ in pairs],
            pairs[0][0].step,
        )
        row = row.to(controller.weights["w1"].dtype)
        lr = lr * _controller.log_factors(controller.config, controller.weights, row).exp()
    for particle, gradient in pairs:
        particle.step += 1
        particle.first = torch.lerp(particle.first, gradient, 1 - beta1)
        particle.second = beta2 * particle.second + (1 - beta2) * gradient.square()
        corrected = particle.second / (1 - beta2**particle.step)
        # the root of zero has no finite derivative
        root = (corrected + 1e-30).sqrt() + group["eps"]
        step = particle.first / (1 - beta1**particle.step) / root
        if memory is not None:
            plain = step
            step = _momentum.direction(memory.weights[index], gradient / root, plain)
            if memory.config.keep_length:
                step = _momentum.with_length_of(step, plain)
        decayed = particle.value * (1 - lr * group["weight_decay"])
        particle.value = (decayed - lr * step).to(particle.value.dtype)


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Replace what has no second derivative: the block-sparse kernels and fused attention."""
    layers = [module for module in model.modules() if isinstance(module, CMSBlockLinear)]
    for layer in layers:
        # an instance attribute hides the method; the densified weight is differentiable
        layer.forward = _dense_forward(layer)  # type: ignore[method-assign,assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _dense_forward(layer: CMSBlockLinear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return functional.linear(x, layer.to_dense(), layer.bias)

    return forward
