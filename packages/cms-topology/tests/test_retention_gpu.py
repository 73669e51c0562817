"""Retention on a GPU: exact under TF32 and autocast, without waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cms_topology import (
    CMSBlockLinear,
    DriftController,
    RetentionGuard,
    consolidate,
    make_probes,
)
from cms_topology._retention import _projection

pytestmark = pytest.mark.gpu


class Network(nn.Module):
    def __init__(self, row_group: int) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"tile_size": 16, "row_group": row_group}
        self.fc1 = CMSBlockLinear(128, 256, **kwargs)
        self.fc2 = CMSBlockLinear(256, 128, **kwargs)
        self.head = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc2(nn.functional.gelu(self.fc1(x))))


def inputs(seed: int, rank: int = 40) -> Tensor:
    """512 tokens in a subspace, so that there is room beside it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 128, generator=generator)
    return (torch.randn(512, rank, generator=generator) @ basis / rank**0.5).cuda()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :32]).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, amp: bool) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = loss_of(model, inputs(2 + step % 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("row_group", [1, 4])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("amp", [False, True])
def test_old_answers_stay_although_products_run_in_tf32(
    row_group: int, options: dict[str, bool], amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Network(row_group).cuda()
    old = inputs(1)
    memory = consolidate(model, [old], loss_fn=loss_of)
    before = model(old).detach()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **options)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0)
    losses = train(model, optimizer, 40, amp)
    monkeypatch.undo()
    assert losses[-1] < 0.97 * losses[0]
    torch.testing.assert_close(model(old), before, rtol=0, atol=2e-4)
    assert max(guard.drift().values()) < 1e-8


def test_drift_stays_in_budget_without_waiting_for_the_device() -> None:
    torch.manual_seed(0)
    model = Network(4).cuda()
    memory = consolidate(model, [inputs(1)], loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    guard = RetentionGuard(model, optimizer, memory, drift=1e-3, eps=0.1)
    train(model, optimizer, 4, amp=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        guard.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    train(model, optimizer, 20, amp=False)
    assert max(guard.drift().values()) < 1e-3 * (1 + 1e-2)  # projected in TF32
    assert guard.metrics()["retention/layers_at_budget_frac"] == 1.0


def test_the_same_memory_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = Network(4)
    old = inputs(1).cpu()
    on_cpu = consolidate(model, [old], loss_fn=loss_of)
    on_gpu = consolidate(model.cuda(), [old.cuda()], loss_fn=loss_of).to("cpu").to_tensors()
    for name, expected in on_cpu.to_tensors().items():
        if not name.startswith("drift"):
            torch.testing.assert_close(on_gpu[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("rank", [40, 128])
def test_gradients_are_damped_without_waiting_for_the_device(rank: int) -> None:
    torch.manual_seed(0)
    model = Network(4).cuda()
    memory = consolidate(model, [inputs(1, rank)], loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.1, gradients=True)
    train(model, optimizer, 2, amp=False)
    guard.before_step()
    optimizer.zero_grad()
    loss_of(model, inputs(2, 128)).backward()
    plain = model.head.weight.grad.double()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        guard.before_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    K = memory.layers["head.weight"].covariance.dense(torch.float64).cuda()
    expected = plain @ (0.1 * torch.linalg.inv(K + 0.1 * torch.eye(128).cuda()))
    error = (model.head.weight.grad - expected).norm() / plain.norm()
    assert error < 0.05  # directions of which less would be taken away are left alone
    assert expected.norm() < 0.9 * plain.norm()


def guarded(steps: int, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = Network(4).cuda()
    memory = consolidate(model, [inputs(1)], loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    guard = RetentionGuard(model, optimizer, memory, **settings)
    train(model, optimizer, steps, amp=False)
    assert guard.drift()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_kernels_project_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"drift": 1e-4, "eps": 0.1, "every": 3}
    found, again = (guarded(12, **settings) for _ in range(2))
    assert all(map(torch.equal, found, again)), "to the bit from run to run"
    monkeypatch.setattr(_projection, "reachable", lambda *_: None)
    expected = guarded(12, **settings)
    torch.manual_seed(0)
    start = Network(4).cuda().parameters()
    for got, wanted, before in zip(found, expected, start, strict=True):
        moved = (wanted - before).norm()
        assert (got - wanted).norm() <= 0.01 * moved  # in TF32; Adam follows small differences


def test_what_takes_nothing_away_changes_no_bit() -> None:
    torch.manual_seed(0)
    model = Network(4).cuda()
    memory = consolidate(model, [inputs(1)], loss_fn=loss_of)
    guard = RetentionGuard(model, None, memory, drift=1e9, eps=1e300)
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 3, amp=False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    guard.flush()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_model_on_another_device_than_the_current_one() -> None:
    def weights(device: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(device)
        x = inputs(1)[:, :64].to(device)
        probes = make_probes(model, x, confidence=0.0)
        memory = consolidate(model, [x], loss_fn=lambda m, b: m(b).square().mean(), probes=probes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        controller = DriftController(1e-3, start=1e-3, device=device)
        RetentionGuard(model, optimizer, memory, drift=controller, measure_every=1)
        for _ in range(4):
            optimizer.zero_grad()
            (model(x) - x[:, :32]).square().mean().backward()
            optimizer.step()
        return model[0].weight.detach().cpu()

    torch.testing.assert_close(weights("cuda:1"), weights("cuda:0"), rtol=1e-4, atol=1e-6)
