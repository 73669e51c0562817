"""Methods that pull the weights back to where the old task left them: L2 and EWC."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from titanmac_integration._labels import IGNORE_INDEX
from titanmac_integration._training._trainer import Trainer

from ._method import Method, Sampling, device_of, task_batches
from ._score import RetentionTask


class L2(Method):
    """Adds the gradient of (dial / 2) ||theta - theta_old||^2."""

    name = "l2"
    dial_name = "strength"
    dials = tuple(10.0**k for k in range(-6, 4))
    default_dial = 1e-2
    keeps = "weights"

    @torch.no_grad()
    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        self.kept.append({name: p.detach().clone() for name, p in model.named_parameters()})

    @torch.no_grad()
    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        assert self.dial is not None
        for anchor in self.kept:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor[name], alpha=self.dial)


class EWC(Method):
    """Elastic weight consolidation: L2 weighted by the diagonal Fisher information.

    Kirkpatrick et al. 2017. The Fisher matrix is the true one, with labels drawn from the model's
    own predictions, squared per example (van de Ven 2025, "On the computation of the Fisher
    information in continual learning").
    """

    name = "ewc"
    dial_name = "strength"
    dials = tuple(10.0**k for k in range(2, 13))
    default_dial = 1e8
    keeps = "fisher"
    rows = 256
    """Sequences that the Fisher information is measured on."""

    def remember(self, model: nn.Module, task: RetentionTask, sampling: Sampling) -> None:
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.kept.append((anchor, diagonal_fisher(model, task, sampling, self.rows)))

    @torch.no_grad()
    def on_backward(self, trainer: Trainer, loss: Tensor) -> None:
        assert self.dial is not None
        for anchor, fisher in self.kept:
            moving = {n: p for n, p in trainer.model.named_parameters() if p.grad is not None}
            grads = [p.grad for p in moving.values() if p.grad is not None]
            moved = torch._foreach_sub(list(moving.values()), [anchor[name] for name in moving])
            torch._foreach_addcmul_(grads, moved, [fisher[name] for name in moving], self.dial)


def sampled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, summed, of labels drawn from the model at the tokens that count."""
    counts = labels[:, 1:] != IGNORE_INDEX
    chosen = logits[:, :-1][counts].float()
    drawn = torch.multinomial(chosen.detach().softmax(-1), 1)[:, 0]
    return functional.cross_entropy(chosen, drawn, reduction="sum")


def diagonal_fisher(
    model: nn.Module, task: RetentionTask, sampling: Sampling, rows: int
) -> dict[str, Tensor]:
    """Mean over ``rows`` sequences of the squared gradient per token, shaped like the parameters.

    Tokens are independent given what precedes them, so squaring per sequence has the expectation
    of squaring per token.
    """
    batches = task_batches(task, sampling._replace(batch_size=1), rows, device_of(model))
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    tokens = 0
    model.eval()
    for batch in batches:
        loss = sampled_loss(model(batch["input_ids"])["logits"], batch["labels"])
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name].addcmul_(grad, grad)
    return {name: value / tokens for name, value in total.items()}
