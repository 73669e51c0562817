"""Damping of gradients is eps (K + eps I)^-1, whichever way it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cms_topology import RetentionGuard, consolidate
from cms_topology._retention._basis import eigenbasis
from cms_topology._retention._damping import NEGLIGIBLE, Damping


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    directions=st.integers(0, 9),
    units=st.integers(1, 3),
    eps=st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    growth=st.sampled_from([1.0, 4.0]),
    chosen=st.sampled_from([None, [1], [0, 1]]),
    seed=st.integers(0, 99),
)
def test_it_is_the_factor(
    n: int, directions: int, units: int, eps: float, growth: float, chosen: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    L, G, m, r = 2, units, 3, min(directions, n)
    # all directions beside the leading ones share one eigenvalue
    rest = 0.02 if r < n else 0.0
    K = torch.empty(L, G, n, n, dtype=torch.float64)
    for each in K.view(-1, n, n):
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        values = torch.full((n,), rest, dtype=torch.float64)
        values[:r] = rest + 2 * torch.rand(r, generator=generator, dtype=torch.float64)
        each.copy_(turn * values @ turn.mT)
    bases = [eigenbasis(layer, torch.float64, r) for layer in K]
    spectrum = torch.stack([torch.cat((b.values, b.rest[:, None]), 1) for b in bases])
    damping = Damping(spectrum, torch.stack([b.vectors for b in bases]), eps)

    gradients = torch.randn(L, G, m, n, generator=generator, dtype=torch.float64)
    layers = list(range(L)) if chosen is None else chosen
    found = damping(gradients[layers], growth * eps, chosen)

    share = K @ torch.linalg.pinv(K + growth * eps * torch.eye(n))  # what is taken away
    expected = gradients - gradients @ share
    # directions of which less would be taken away may be left alone
    bound = NEGLIGIBLE * gradients.flatten(2).norm(dim=2) + 1e-9
    error = (found - expected[layers]).flatten(2).norm(dim=2)
    assert (error <= bound[layers]).all()


@pytest.mark.parametrize("width", [6, 40])
def test_it_lets_go_with_release(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 8, bias=False)
    x = torch.randn(64, 40)
    x[:, width:] = 0.0  # few directions, or all
    memory = consolidate(
        model, [x], "a", loss_fn=lambda net, b: net(b).square().mean(), sensitivity_batches=0
    )
    seen: list[Tensor] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            assert model.weight.grad is not None
            seen.append(model.weight.grad.clone())

    optimizer = Watching(model.parameters(), lr=1.0)
    RetentionGuard(model, optimizer, memory, drift=None, eps=0.1, release=4, gradients=True)
    K = memory.layers["weight"].covariance.dense(torch.float32)
    for step in range(6):
        model.weight.grad = gradient = torch.randn(8, 40)
        plain = gradient.clone()
        optimizer.step()
        if step >= 4:
            assert torch.equal(seen[-1], plain), step
            continue
        eps = 0.1 / (1 - step / 4) ** 2
        expected = plain @ (eps * torch.linalg.inv(K + eps * torch.eye(40)))
        assert (seen[-1] - expected).norm() < 0.05 * plain.norm(), step
