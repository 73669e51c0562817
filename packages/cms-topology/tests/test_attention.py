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


@pytest.mark.parametrize("usage", ["loss", "none"])
def test_statistics_of_cross_attention_are_those_of_each_slice(usage: str) -> None:
    torch.manual_seed(0)
    model, x = Attention(cross=True), torch.randn(3, 5, WIDTH)
    x[:, 0] = 1  # so that turned round it is another
    memory = consolidate(model, [x], loss_fn=loss_of, usage=usage)
    found = memory.layers["attention.in_proj_weight"]
    got = found.covariance.dense() * found.energy.double()
    for slice_, inputs in zip(got, (x, x.flip(1), x.flip(1)), strict=True):
        flat = inputs.flatten(0, 1).double()
        torch.testing.assert_close(slice_, flat.T @ flat / flat.shape[0], rtol=1e-5, atol=1e-6)


def test_one_matrix_may_serve_attention_to_itself_and_to_others() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(3, 5, WIDTH), Attention(cross=False)
    once = consolidate(model, [x], "self", loss_fn=loss_of)
    model.cross = True
    both = consolidate(model, [x], "cross", loss_fn=loss_of, previous=once)
    layers = [memory.layers["attention.in_proj_weight"] for memory in (once, both)]
    assert [layer.covariance.groups for layer in layers] == [1, 3]
    alone = consolidate(model, [x], loss_fn=loss_of).layers["attention.in_proj_weight"]
    want = layers[0].covariance.dense() + alone.covariance.dense()
    torch.testing.assert_close(layers[1].covariance.dense(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_attention_keeps_old_answers_and_learns_new_ones(cross: bool) -> None:
    torch.manual_seed(0)
    model = Attention(cross)
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
