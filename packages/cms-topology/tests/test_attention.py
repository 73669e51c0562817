"""Retention of torch's own attention, whose products torch runs behind one call."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from cms_topology import RetentionGuard, consolidate

WIDTH = 16


class Attention(nn.Module):
    """One attention over inputs [batch, sequence, width]."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.flip(1) if self.cross else x
        out: torch.Tensor = self.attention(x, other, other, need_weights=False)[0]
        return out


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("usage", ["loss", "none"])
def test_statistics_of_self_attention_are_those_of_its_inputs(usage: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(cross=False), torch.randn(3, 5, WIDTH)
    memory = consolidate(model, [x], loss_fn=loss_of, usage=usage)
    assert sorted(memory.layers) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    flat = x.flatten(0, 1).double()
    want = flat.T @ flat / flat.shape[0]
    found = memory.layers["attention.in_proj_weight"]
    got = found.covariance.matrix.double() * found.energy
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert functional.linear is torch._C._nn.linear  # nothing stays replaced


def test_cross_attention_counts_as_unseen_but_for_its_output() -> None:
    torch.manual_seed(0)
    memory = consolidate(Attention(cross=True), [torch.randn(3, 5, WIDTH)], loss_fn=loss_of)
    assert list(memory.layers) == ["attention.out_proj.weight"]


def test_self_attention_keeps_old_answers_and_learns_new_ones() -> None:
    torch.manual_seed(0)
    model = Attention(cross=False)
    directions = torch.zeros(WIDTH)
    directions[: WIDTH // 2] = 1
    old, new = torch.randn(4, 5, WIDTH) * directions, torch.randn(4, 5, WIDTH) * (1 - directions)
    before = model(old).detach()
    memory = consolidate(model, [old], loss_fn=loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0)
    start = loss_of(model, new).item()
    weight = model.attention.in_proj_weight.detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model, new).backward()
        optimizer.step()
    guard.remove()
    assert loss_of(model, new).item() < 0.99 * start
    assert not torch.equal(model.attention.in_proj_weight, weight)
    assert torch.allclose(model(old), before, atol=1e-5)
