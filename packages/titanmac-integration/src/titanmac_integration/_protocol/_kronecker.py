"""EWC with Kronecker-factored curvature of every linear layer.

Legend: o outputs, i inputs of a layer; R, K, B as in CMSBlockLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear
from titanmac_integration._labels import IGNORE_INDEX
from titanmac_integration._training._trainer import Trainer

from ._anchored import diagonal_fisher, sampled_loss
from ._method import Method, Sampling, device_of, task_batches
from ._score import RetentionTask


class KroneckerEWC(Method):
    """Adds the gradient of (dial / 2) tr(G dW A dW^T) per linear layer; diagonal EWC elsewhere.

    A is the covariance of the layer's inputs, G that of its output gradients under labels drawn
    from the model. Ritter et al. 2018, "Online structured Laplace approximations for overcoming
    catastrophic forgetting". The head is one of the layers.
    """

    name = "kronecker-ewc"
    dial_name = "strength"
    dials = tuple(10.0**k for k in range(1, 12))
    default_dial = 1e6
    keeps = "kronecker"
    rows, batches = 256, 20
    """Sequences that the diagonal is measured on, batches that the factors are measured on."""

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        factors = kronecker_factors(model, task, sampling, self.batches)
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        fisher = diagonal_fisher(model, task, sampling, self.rows)
        for name in factors:
            fisher.pop(f"{name}.{_weight_name(model, name)}", None)
        self.kept.append((anchor, fisher, factors))

    @torch.no_grad()
    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        assert self.dial is not None
        model = trainer.model
        parameters = dict(model.named_parameters())
        for anchor, fisher, factors in self.kept:
            for name, value in fisher.items():
                parameter = parameters[name]
                if parameter.grad is not None:
                    parameter.grad.addcmul_(parameter - anchor[name], value, value=self.dial)
            for name, (inputs, errors) in factors.items():
                layer: Any = model.get_submodule(name)
                weight = f"{name}.{_weight_name(model, name)}"
                parameter = parameters[weight]
                if parameter.grad is None:
                    continue
                moved = _dense(layer, parameter - anchor[weight])
                pull = errors @ moved @ inputs
                parameter.grad.add_(_like_weight(layer, pull), alpha=self.dial)


def kronecker_factors(
    model: nn.Module, task: RetentionTask, sampling: Sampling, n_batches: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per linear layer the mean of x x^T [i, i] and of g g^T [o, o] over tokens.

    g is the gradient of the loss of the tokens that count, per token that counts.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, CMSBlockLinear))
    }
    inputs = {name: _zeros(model, x.in_features) for name, x in layers.items()}
    errors = {name: _zeros(model, x.out_features) for name, x in layers.items()}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        inputs[name].addmm_(flat.T, flat, alpha=1 / len(flat))

        def see_error(grad: Tensor) -> None:
            g = grad.flatten(0, -2)
            errors[name].addmm_(g.T, g)

        y.register_hook(see_error)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, x, y: see(name, x[0], y)

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in layers.items() if name != "head"
    ]
    seen: list[Tensor] = []
    norm: Any = model.norm
    handles.append(norm.register_forward_hook(lambda module, x, y: seen.append(y)))
    tokens = 0
    model.eval()
    try:
        for batch in task_batches(task, sampling, n_batches, device_of(model)):
            seen.clear()
            logits = model(batch["input_ids"])["logits"]
            if "head" in layers:
                see("head", seen[-1], logits)
            loss = sampled_loss(logits, batch["labels"])
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: (inputs[name] / n_batches, errors[name] / tokens) for name in layers}


def _zeros(model: nn.Module, size: int) -> Tensor:
    return torch.zeros(size, size, device=device_of(model))


def _weight_name(model: nn.Module, layer: str) -> str:
    return "values" if isinstance(model.get_submodule(layer), CMSBlockLinear) else "weight"


def _dense(layer: nn.Module, values: Tensor) -> Tensor:
    """A tensor shaped like the layer's weight as [o, i], zero where a block is absent."""
    if not isinstance(layer, CMSBlockLinear):
        return values
    live = layer.num_live
    dense = values.new_zeros(layer.R, layer.C, layer.B, layer.B)
    columns = layer.col_indices[:, :live].long()[:, :, None, None]
    dense.scatter_(1, columns.expand(-1, -1, layer.B, layer.B), values[:, :live])
    return dense.transpose(1, 2).reshape(layer.out_features, layer.in_features)


def _like_weight(layer: nn.Module, dense: Tensor) -> Tensor:
    """The inverse, [o, i] -> the shape of the layer's weight, without absent blocks."""
    if not isinstance(layer, CMSBlockLinear):
        return dense
    live = layer.num_live
    blocks = dense.view(layer.R, layer.B, layer.C, layer.B).transpose(1, 2)
    columns = layer.col_indices[:, :live].long()[:, :, None, None]
    values = dense.new_zeros(layer.values.shape)
    values[:, :live] = blocks.gather(1, columns.expand(-1, -1, layer.B, layer.B))
    return values
