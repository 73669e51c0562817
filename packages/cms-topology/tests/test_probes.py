"""Probes and the controller: the old answers are watched, and the budget follows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import (
    Consolidation,
    DriftController,
    Probes,
    RetentionGuard,
    consolidate,
    make_probes,
    sample_tokens,
)


class Follower(nn.Module):
    """Predicts the next symbol from the present one; what it learns is a permutation."""

    def __init__(self, symbols: int = 16, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.fc1, self.fc2 = nn.Linear(width, 48), nn.Linear(48, width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embedding(x)
        h = h + self.fc2(functional.gelu(self.fc1(self.dropout(h))))
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def batch(low: int, high: int, shift: int, seed: int) -> dict[str, Tensor]:
    x = torch.randint(low, high, (8, 12), generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": (x - low + shift) % (high - low) + low}


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, task: tuple[int, int, int],
        steps: int) -> None:  # fmt: skip
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(*task, seed=step))["loss"].backward()
        optimizer.step()


OLD, NEW = (0, 8, 3), (4, 12, 5)  # half of the symbols are shared


def learned() -> Follower:
    torch.manual_seed(0)
    model = Follower()
    fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), OLD, 120)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, task: tuple[int, int, int]) -> float:
    test = batch(*task, seed=10_000)
    model.eval()
    right = model(test["x"])["logits"].argmax(-1) == test["labels"]
    model.train()
    return float(right.float().mean())


def own_samples(model: nn.Module, generator: torch.Generator) -> Tensor:
    first = torch.randint(0, 8, (16, 1), generator=generator)
    return sample_tokens(model, first, 12, generator=generator)


def test_a_model_makes_up_its_own_probes() -> None:
    model = learned()
    random = torch.get_rng_state()
    probes = make_probes(model, own_samples)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert probes.inputs.shape == (16, 12)
    follows = (probes.inputs[:, :-1] + 3) % 8 == probes.inputs[:, 1:]
    assert follows.float().mean() > 0.9  # what it has learned, without any data
    assert float(probes.divergence(model.eval()(probes.inputs)["logits"])) < 1e-6


def test_probes_survive_a_checkpoint() -> None:
    model = learned()
    probes = make_probes(model, own_samples)
    memory = consolidate(model, [batch(*OLD, seed=0)], "a", probes=probes)
    both = consolidate(model, [batch(*OLD, seed=1)], "b", probes=probes, previous=memory)
    restored = Consolidation.from_tensors(load(save(both.to_tensors())))
    assert len(restored.probes) == 2
    for name, tensor in both.probes[1].tensors().items():
        assert torch.equal(restored.probes[1].tensors()[name], tensor)


def test_watched_it_keeps_the_old_task_and_learns_the_new_one(tmp_path: Path) -> None:
    results = {}
    for guarded in (True, False):
        model = learned()
        assert accuracy(model, OLD) == 1.0
        memory = consolidate(
            model, [batch(*OLD, seed=s) for s in range(4)], "a",
            probes=make_probes(model, own_samples),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        guard = RetentionGuard(model, optimizer, memory, tolerance=0.01) if guarded else None
        lowest, budgets = 1.0, []
        for _ in range(10):
            fit(model, optimizer, (8, 16, 5), 12)
            lowest = min(lowest, accuracy(model, OLD))
            if guard is not None:
                budgets.append(guard.budget)
        results[guarded] = (lowest, accuracy(model, (8, 16, 5)))
        if guard is not None:
            assert budgets[0] == pytest.approx(1.5e-5)
            assert budgets[-1] > 2 * budgets[0]  # it has found out how far it may go
            assert guard.metrics()["retention/divergence"] < 0.05
    assert results[True][0] == 1.0
    assert results[True][1] > 0.9
    assert results[False][0] < 0.8


def test_what_the_second_task_cost_the_first_leaves_room_for_a_third() -> None:
    model = learned()
    memory = consolidate(model, [batch(*OLD, seed=0)], "a", probes=make_probes(model, own_samples))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard = RetentionGuard(model, optimizer, memory, drift=0.03, eps=math.inf)
    fit(model, optimizer, NEW, 30)
    guard.remove()
    answers = model.eval()(memory.probes[0].inputs)["logits"]
    lost = float(memory.probes[0].divergence(answers))
    assert lost > 3e-3
    both = consolidate(model, [batch(*NEW, seed=0)], "b", previous=memory,
                       probes=make_probes(model, own_samples))  # fmt: skip
    guard = RetentionGuard(model, optimizer, both, tolerance=1e-3)
    fit(model, optimizer, (8, 16, 5), 10)
    assert guard.metrics()["retention/divergence"] < 1e-3
    assert guard.budget is not None
    assert guard.budget > 1e-5  # wider than at first
    guard.remove()


DIVERGENCE = """
import sys, torch
from cms_topology import make_probes
from cms_topology._retention import _divergence_kernel, _probes

device = sys.argv[1]
torch.manual_seed(0)
half, bfloat = torch.float16, torch.bfloat16
for V, k, dtype in ((2, 64, torch.float32), (300, 64, half), (5000, 3, bfloat), (257, 1, half)):
    then = 4 * torch.randn(3, 7, V, device=device)
    probes = make_probes(torch.nn.Identity(), then, confidence=0.2 * (V < 999), classes=k)
    kept = (probes.positions, probes.classes, probes.log_probs, _probes.LOST_NATS)
    for scale in (0.0, 0.1, 3.0):
        now = (then + scale * torch.randn_like(then)).to(dtype)
        now[0, 0, 1:] = -torch.inf
        flat = now.flatten(0, -2)
        found = _divergence_kernel.divergences(flat, *kept).mean()
        expected = probes._by_torch(flat, _probes.LOST_NATS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert device == "cpu" or torch.equal(probes.divergence(now), found)
    now[:, :, 0] = torch.nan
    assert _divergence_kernel.divergences(now.flatten(0, -2), *kept).isnan().all()
print("agrees")
"""


def test_the_kernel_agrees_with_torch(run_alone: Callable[[str, Mapping[str, str]], None]) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    run_alone(DIVERGENCE, os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"}))


@pytest.mark.parametrize(("start", "narrow"), [(1e-5, True), (1e-3, False)])
def test_small_budgets_are_known_as_narrow(start: float, narrow: bool) -> None:
    model = learned()
    memory = consolidate(model, [batch(*OLD, seed=0)], probes=make_probes(model, own_samples))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    controller = DriftController(10.0, start=start, smallest=1e-8, widen=1.5)
    guard = RetentionGuard(model, optimizer, memory, drift=controller, eps=math.inf)
    assert guard._narrow is narrow
    fit(model, optimizer, (8, 16, 5), 10)
    assert guard.budget is not None
    assert guard._narrow is (guard.budget < 1e-4)
    controller.budget.fill_(1e-6 if not narrow else 1e-2)
    guard.load_state_dict(guard.state_dict())
    assert guard._narrow is not narrow
    guard.remove()


def test_answers_behind_foreign_symbols_are_left_out() -> None:
    model = learned()
    inputs = torch.tensor([[0, 1, 2, 3], [4, 9, 5, 6], [12, 1, 2, 3]])  # the task uses 0 to 7
    probes = make_probes(model, inputs, confidence=0.0)
    assert len(probes.positions) == 12
    kept = consolidate(model, [batch(*OLD, seed=0)], probes=probes).probes[0]
    assert kept.positions.tolist() == [0, 1, 2, 3, 4]
    foreign = make_probes(model, inputs[2:], confidence=0.0)
    with pytest.raises(ValueError, match="must have some that follow only symbols the task uses"):
        consolidate(model, [batch(*OLD, seed=0)], probes=foreign)


def test_samples_hold_only_allowed_symbols() -> None:
    allowed = torch.arange(16) < 5
    first = torch.zeros(32, 1, dtype=torch.int64)
    tokens = sample_tokens(Follower().eval(), first, 10, allowed=allowed)
    assert set(tokens[:, 1:].flatten().tolist()) == set(range(5))


def test_the_budget_continues_after_a_resume() -> None:
    def setup(model: nn.Module, memory: Consolidation) -> tuple[Any, RetentionGuard]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, RetentionGuard(model, optimizer, memory, measure_every=2)

    model = learned().eval()
    memory = consolidate(model, [batch(*OLD, seed=0)], probes=make_probes(model, own_samples))
    optimizer, guard = setup(model, memory)
    model.dropout.p = 0.0
    fit(model, optimizer, NEW, 5)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = guard.state_dict()
    fit(model, optimizer, NEW, 4)

    other = Follower()
    other.load_state_dict(weights)
    other.dropout.p = 0.0
    optimizer, second = setup(other, memory)
    second.load_state_dict(state)
    fit(other, optimizer, NEW, 4)
    assert second.budget == guard.budget
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_divergence_is_the_textbook_one_and_never_larger_when_cut() -> None:
    torch.manual_seed(0)
    then, now = torch.randn(5, 7, 9), torch.randn(5, 7, 9)

    class Answers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    expected = functional.kl_div(
        now.flatten(0, 1).double().log_softmax(-1), then.flatten(0, 1).double().log_softmax(-1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
    whole = make_probes(Answers(), then, confidence=0.0)
    torch.testing.assert_close(whole.divergence(now, math.inf), expected, rtol=1e-5, atol=1e-8)
    cut = make_probes(Answers(), then, confidence=0.0, classes=3)
    assert 0 < cut.divergence(now, math.inf) < expected
    assert 0 < whole.divergence(now) < math.log(2) < expected
    lost = torch.where(now == now.amax(-1, keepdim=True), -50.0, now)
    assert whole.divergence(lost, math.inf) > 5
    assert float(whole.divergence(lost)) <= math.log(2) * (1 + 1e-9)
    few = make_probes(Answers(), then, confidence=0.0, max_answers=4)
    assert len(few.positions) == 4
    sure = make_probes(Answers(), then, confidence=0.4)
    assert (then.softmax(-1).amax(-1) >= 0.4).sum() == len(sure.positions)


@given(
    st.floats(1e-4, 1.0),
    st.floats(1e-6, 1e-2),
    st.lists(st.floats(0, 1e3) | st.just(float("nan")), min_size=1, max_size=30),
)
@settings(max_examples=50, deadline=None)
def test_the_controller_moves_towards_the_target(
    target: float, start: float, measured: list[float]
) -> None:
    controller = DriftController(target, start=start)
    for value in measured:
        before = float(controller.budget)
        after = float(controller.update(torch.tensor(value, dtype=torch.float64)))
        assert 1e-8 <= after <= 1.0
        most = 1.5 if value < 0.1 * target else 1.1
        assert 0.3 * before * (1 - 1e-9) <= after <= most * before * (1 + 1e-9) or after == 1e-8
        if value > target or value != value:
            assert after < before or before == 1e-8
        elif before < 0.9:
            assert after >= before * (1 - 1e-9)


def test_the_controller_finds_the_budget_of_a_quadratic_world() -> None:
    controller = DriftController(0.003)
    for _ in range(100):
        controller.update(2.0 * controller.budget)
    assert float(controller.budget) == pytest.approx(0.0015, rel=1e-3)


def test_the_controller_does_not_run_ahead_of_the_weights() -> None:
    """While something else bounds the drift, the budget stays near it and can act at once."""
    controller = DriftController(0.003)
    drift = torch.tensor(2e-4, dtype=torch.float64)
    for _ in range(100):
        controller.update(torch.tensor(1e-3), drift)
    assert float(controller.budget) == pytest.approx(2.2e-4)
    controller.update(torch.tensor(0.01), drift)
    assert float(controller.budget) < 2e-4, "the first bad answer binds"
    controller = DriftController(0.003, start=1e-4)
    controller.update(torch.tensor(1e-3), torch.zeros(()))
    assert float(controller.budget) == pytest.approx(1.1e-4), "weights that stood still may begin"


def test_the_budget_opens_fast_while_nothing_happens() -> None:
    controller = DriftController(0.003)
    controller.update(torch.tensor(1e-4))
    assert float(controller.budget) == pytest.approx(1.5e-5)
    controller.update(torch.tensor(1e-3))
    assert float(controller.budget) == pytest.approx(1.65e-5)


def test_the_controller_does_not_stop_all_learning() -> None:
    controller = DriftController(0.003, smallest=1e-6)
    for _ in range(100):
        controller.update(torch.tensor(1.0))
    assert float(controller.budget) == 1e-6


def test_what_is_wrong_is_said() -> None:
    model = learned()
    with pytest.raises(ValueError, match="must not be combined with probes"):
        consolidate(
            model, [batch(*OLD, seed=0)], influence=True, probes=make_probes(model, own_samples),
            outputs_fn=lambda m, b: m(b["x"])["logits"],
        )  # fmt: skip
    memory = consolidate(model, [batch(*OLD, seed=0)])
    with pytest.raises(ValueError, match=r"confidence \(=1.5\) must be in \[0, 1\]"):
        make_probes(model, own_samples, confidence=1.5)
    with pytest.raises(ValueError, match=r"confidence \(=1.0\) must be reached by some answer"):
        make_probes(Follower(), own_samples, confidence=1.0)
    with pytest.raises(ValueError, match=r"temperature \(=0\) must be greater than 0"):
        sample_tokens(model, torch.zeros(1, 1, dtype=torch.int64), 2, temperature=0)
    with pytest.raises(ValueError, match=r"drift \(=DriftController\) needs probes to watch"):
        RetentionGuard(model, None, memory, drift=DriftController(0.1))
    for kwargs, message in (
        ({"target": 0}, r"target \(=0\) must be greater than 0 nats"),
        ({"target": 1, "start": 2}, r"start \(=2\) must be in \[smallest, 1.0\]"),
        ({"target": 1, "widen": 1}, r"widen \(=1\) must be greater than 1"),
        ({"target": 1, "open": 1.05}, r"open \(=1.05\) must be at least widen \(=1.1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftController(**kwargs)  # type: ignore[arg-type]
    watched = consolidate(model, [batch(*OLD, seed=0)], probes=make_probes(model, own_samples))
    state = RetentionGuard(model, None, watched).state_dict()
    with pytest.raises(ValueError, match="must be controlled as in the checkpoint"):
        RetentionGuard(model, None, watched, drift=None).load_state_dict(state)
    assert Probes.from_tensors(watched.probes[0].tensors()).inputs.shape == (16, 12)
