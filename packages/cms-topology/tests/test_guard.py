"""RetentionGuard: the two ends of its dials are exact, and what lies between is in bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import CMSBlockLinear, Consolidation, RetentionGuard, consolidate

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
}
A, B = range(10), range(10, 20)


class Network(nn.Module):
    """An embedding, a norm, a residual MLP with one sparse and one dense matrix, and a head."""

    def __init__(self, tied: bool = False, row_group: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.norm = nn.LayerNorm(32)
        self.fc1 = CMSBlockLinear(32, 64, tile_size=8, max_density=0.75, row_group=row_group)
        self.fc2 = nn.Linear(64, 32)
        self.head = None if tied else nn.Linear(32, 20, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.norm(self.embedding(x))
        h = h + self.fc2(functional.relu(self.fc1(h)))
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = functional.linear(h, weight)
        if labels is None:
            return {"logits": logits}
        return {
            "logits": logits,
            "loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        }


def batches(symbols: range, count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randint(symbols.start, symbols.stop, (4, 6), generator=generator)
        for _ in range(count)
    ]
    return [{"x": x, "labels": x.roll(1, 1)} for x in drawn]


@cache
def remembered(**kwargs: Any) -> Consolidation:
    torch.manual_seed(0)
    return consolidate(Network(**kwargs), batches(A), "a")


def make(**kwargs: Any) -> tuple[Network, Consolidation]:
    torch.manual_seed(0)
    return Network(**kwargs), remembered(**kwargs)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10, seed: int = 1
) -> float:
    loss = torch.zeros(())
    for batch in batches(B, steps, seed):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return torch.stack([model(batch["x"])["logits"] for batch in batches(A)])


@pytest.mark.parametrize(("tied", "row_group", "every"), [(True, 1, 1), (False, 4, 5)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_slack_the_old_answers_stay_to_rounding(
    tied: bool, row_group: int, every: int, name: str
) -> None:
    model, memory = make(tied=tied, row_group=row_group)
    before = answers(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0, every=every)
    start = model(**batches(B, 1)[0])["loss"].item()
    train(model, optimizer)
    torch.testing.assert_close(answers(model), before, rtol=0, atol=2e-5)
    assert max(guard.drift().values()) < 1e-9
    assert model(**batches(B, 1)[0])["loss"].item() < start  # and yet it has learned


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_limits_it_is_the_plain_optimizer_to_the_bit(name: str) -> None:
    results = []
    for guarded in (False, True):
        model, memory = make()
        optimizer = OPTIMIZERS[name](model.parameters())
        if guarded:
            RetentionGuard(model, optimizer, memory, drift=None, eps=math.inf)
        train(model, optimizer)
        results.append(model.state_dict())
    for key, plain in results[0].items():
        assert torch.equal(plain, results[1][key]), key


def test_what_has_no_statistics_stays_to_the_bit_and_unused_rows_learn() -> None:
    model, memory = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS["adamw-foreach"](model.parameters())
    RetentionGuard(model, optimizer, memory, drift=0.1, every=7)
    train(model, optimizer, steps=10)  # not a multiple of the interval
    for name in ("norm.weight", "norm.bias", "fc1.bias", "fc2.bias"):
        assert torch.equal(model.get_parameter(name), before[name]), name
    embedding = model.embedding.weight.detach()
    used = sorted({int(t) for batch in batches(A) for t in batch["x"].flatten()})
    assert torch.equal(embedding[used], before["embedding.weight"][used])
    assert not torch.isclose(embedding[10:], before["embedding.weight"][10:]).all(1).any()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("eps", [math.inf, None])
def test_drift_never_exceeds_its_budget(every: int, eps: float | None) -> None:
    model, memory = make()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    guard = RetentionGuard(model, optimizer, memory, drift=1e-3, eps=eps, every=every)
    for seed in range(4):
        train(model, optimizer, steps=3, seed=seed)
        assert max(guard.drift().values()) <= 1e-3 * (1 + 1e-4)
    assert guard.metrics()["retention/layers_at_budget_frac"] > 0


def test_drift_is_the_error_of_the_outputs_on_the_old_data() -> None:
    model, memory = make()
    inputs: list[Tensor] = []
    hook = model.fc1.register_forward_hook(lambda _, args, __: inputs.append(args[0].flatten(0, 1)))
    answers(model)
    hook.remove()
    x = torch.cat(inputs)
    bias = model.fc1.bias.detach()
    before = model.fc1(x).detach()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    guard = RetentionGuard(model, optimizer, memory, drift=0.01)
    train(model, optimizer)
    error = (model.fc1(x).detach() - before).square().sum() / (before - bias).square().sum()
    assert guard.drift()["fc1.values"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("eps", [0.1, math.inf])
def test_layers_projected_together_may_differ_in_rank(eps: float) -> None:
    class TwoInputs(nn.Module):
        """One matrix reads inputs of few directions and noise, the other of all directions."""

        def __init__(self) -> None:
            super().__init__()
            self.few, self.all = (nn.Linear(16, 16, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.few(x[:, :16]), self.all(x[:, 16:])), 1)

    torch.manual_seed(0)
    model = TwoInputs()
    energy = torch.cat((torch.full((16,), 0.1), 1 / torch.arange(1, 17)))
    energy[:2] = 1.0
    old = torch.randn(4000, 32) * energy
    memory = consolidate(model, [old], loss_fn=lambda m, x: m(x).square().mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = RetentionGuard(model, optimizer, memory, drift=1e-3, eps=eps)
    ranks = guard._batches[0]._ranks
    assert len(guard._batches) == 1
    assert min(ranks) < max(ranks) == 16
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(64, 32)) - 1).square().mean().backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        x = old[:, :16] if name.startswith("few") else old[:, 16:]
        change = (x @ (weight.detach() - before[name]).mT).square().sum()
        drift = float(change / (x @ before[name].mT).square().sum())
        assert drift < 1.02e-3, name
        assert guard.drift()[name] == pytest.approx(drift, rel=0.3), name


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_gradients_are_damped_before_the_optimizer_sees_them(eps: float) -> None:
    model, memory = make(row_group=4)
    seen: dict[str, Tensor] = {}

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

    optimizer = Watching(model.parameters(), lr=1.0)
    guard = RetentionGuard(model, optimizer, memory, eps=eps, drift=None, gradients=True)
    model(**batches(B, 1)[0])["loss"].backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    weights = {weight.name: weight for batch in guard._batches for weight in batch.weights}
    expected = {}
    for name, weight in weights.items():
        K = weight.memory.covariance.restricted(weight.columns())
        factor = eps * torch.linalg.inv(K + eps * torch.eye(K.shape[1]))
        gradient = weight.gradient()
        assert gradient is not None
        expected[name] = gradient.read() @ factor.float()
    optimizer.step()
    assert "fc1.values" in weights
    for name, parameter in model.named_parameters():
        if name not in weights:
            assert torch.equal(seen[name], plain[name]), name
            continue
        parameter.grad = seen[name]
        gradient = weights[name].gradient()
        assert gradient is not None
        # directions of which less than 5% would be taken away are left alone
        error = (gradient.read() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name
        assert seen[name].norm() < 0.9 * plain[name].norm(), name


def test_the_control_of_updates_lets_go_in_the_course_of_release() -> None:
    model, memory = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.05, release=8)
    for step in range(1, 11):
        optimizer.zero_grad()
        model(**batches(B, 1, seed=step)[0])["loss"].backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        weight = next(
            w for batch in guard._batches for w in batch.weights if w.name == "head.weight"
        )
        K = weight.memory.covariance.dense(torch.float32)
        head = dict(model.named_parameters())["head.weight"]
        assert head.grad is not None
        update = -0.1 * head.grad
        if step < 8:
            eps = 0.05 / (1 - step / 8) ** 2
            update = update @ (eps * torch.linalg.inv(K + eps * torch.eye(len(K))))
        torch.testing.assert_close(
            head.detach() - before["head.weight"], update, atol=1e-6, rtol=1e-3, msg=str(step)
        )
    with pytest.raises(ValueError, match=r"release \(=-1\) must be 0 or more steps"):
        RetentionGuard(model, None, memory, drift=None, release=-1)
