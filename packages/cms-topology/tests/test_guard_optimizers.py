"""The guard beside optimizers that do not step as SGD does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cms_topology import Consolidation, RetentionGuard, consolidate

HALF = torch.arange(16) < 8


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def data(seed: int, used: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(48, 16, generator=generator) * used
    return x, (x @ torch.randn(16, 4, generator=generator)).tanh()


OLD, NEW = data(0, HALF), data(1, torch.ones(16))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def remember(model: nn.Module) -> Consolidation:
    return consolidate(model, [OLD], "a", loss_fn=loss_of, sensitivity_batches=1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """By a closure, as Lightning and LBFGS do."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, NEW)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
    return float(loss_of(model, NEW).detach())


MADE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=8),
    "lbfgs-wolfe": lambda p: torch.optim.LBFGS(p, max_iter=8, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", MADE)
def test_the_new_task_is_learned_and_the_old_answers_stay(name: str) -> None:
    model = build()
    before, first = model(OLD[0]).detach(), float(loss_of(model, NEW).detach())
    memory = remember(model)
    optimizer = MADE[name](model.parameters())
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0)
    assert train(model, optimizer, 15) < 0.95 * first
    torch.testing.assert_close(model(OLD[0]), before, rtol=0, atol=1e-4)
    assert guard.steps == 15


def test_gradients_that_a_closure_computes_are_damped() -> None:
    models = []
    for closure in (False, True):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        memory = remember(model)
        RetentionGuard(model, optimizer, memory, drift=None, eps=0.01, gradients=True)
        if closure:
            train(model, optimizer, 3)
        else:
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model, NEW).backward()
                optimizer.step()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("matrices_first", [False, True])
def test_several_optimizers_share_a_guard(every: int, matrices_first: bool) -> None:
    model = build()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    muon = getattr(torch.optim, "Muon", torch.optim.SGD)  # of torch 2.9
    optimizers = [muon(matrices, lr=0.01), torch.optim.AdamW(others, 1e-2)]
    if not matrices_first:
        optimizers.reverse()
    before, first = model(OLD[0]).detach(), float(loss_of(model, NEW).detach())
    guard = RetentionGuard(model, optimizers, remember(model), drift=None, eps=0.0, every=every)
    for _ in range(6):
        model.zero_grad()
        loss_of(model, NEW).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert guard.steps == 6
    assert float(loss_of(model, NEW).detach()) < 0.95 * first
    torch.testing.assert_close(model(OLD[0]), before, rtol=0, atol=1e-5)
    guard.remove()
    for optimizer in optimizers:
        optimizer.step()
    assert guard.steps == 6
    assert not torch.allclose(model(OLD[0]), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"optimizer \(=\[\]\) must hold at least one"):
        RetentionGuard(model, [], guard.memory)


class Averaging(torch.optim.SGD):
    """Trains between two sets of weights, as schedule-free optimizers do (Defazio et al. 2024)."""

    def eval(self) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p += 0.1 * p.grad


def test_weights_that_were_not_guarded_are_warned_of() -> None:
    model = build()
    optimizer = Averaging(model.parameters(), 0.1)
    before = model(OLD[0]).detach()
    with pytest.warns(UserWarning, match=r"Averaging\.eval\(\) puts other weights into the model"):
        guard = RetentionGuard(model, optimizer, remember(model), drift=None, eps=0.0)
    train(model, optimizer, 2)
    optimizer.eval()
    assert not torch.allclose(model(OLD[0]), before, rtol=0, atol=1e-5)
    guard.step()  # the remedy
    torch.testing.assert_close(model(OLD[0]), before, rtol=0, atol=1e-5)


def test_a_guard_that_never_acted_is_warned_of() -> None:
    model = build()
    optimizer: Any = torch.optim.SGD(model.parameters(), 0.1)
    guard = RetentionGuard(model, optimizer, remember(model))
    with pytest.warns(UserWarning, match="saw no optimizer step, so it has held nothing"):
        guard.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RetentionGuard(model, None, guard.memory).remove()
