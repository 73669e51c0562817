"""Recurrent layers under retention: every step is a token, for two weights at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from cms_topology import RetentionGuard, consolidate
from cms_topology._retention._capture import captured
from cms_topology._retention._product import Product

KINDS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def seen_by(model: nn.Module, *inputs: Any) -> tuple[Any, list[Product]]:
    products: list[Product] = []
    with captured(model, products.append, lambda *_: None, lambda _: None):
        return model(*inputs), products


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


@settings(deadline=None, max_examples=20)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 2),
    both=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    packed=st.booleans(),
    projected=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_layer_computes_what_torch_computes(
    kind: str,
    layers: int,
    both: bool,
    bias: bool,
    batch_first: bool,
    packed: bool,
    projected: bool,
    relu: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    more: dict[str, Any] = {"proj_size": 3} if projected and kind == "lstm" else {}
    if kind == "rnn":
        more["nonlinearity"] = "relu" if relu else "tanh"
    shared = {"batch_first": batch_first, "bidirectional": both, "bias": bias}
    layer = KINDS[kind](4, 5, layers, **shared, **more).double()
    x: Any = torch.randn(3, 7, 4, dtype=torch.float64)
    sequences = 3 if batch_first or packed else 7
    if packed:
        inner = x if batch_first else x.transpose(0, 1)
        lengths = torch.tensor([4, 7, 2])
        x = pack_padded_sequence(inner, lengths, batch_first=batch_first, enforce_sorted=False)
    out = more.get("proj_size", 5)
    state: Any = torch.randn(layers * (1 + both), sequences, out, dtype=torch.float64)
    if kind == "lstm":
        state = (state, torch.randn(layers * (1 + both), sequences, 5, dtype=torch.float64))
    got, products = seen_by(layer, x, state)
    for mine, theirs in zip(flat(got), flat(layer(x, state)), strict=True):
        torch.testing.assert_close(mine, theirs)
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    assert {id(product.weight) for product in products} == {id(p) for p in matrices}
    assert len(products) == len(matrices)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_computes_what_torch_computes(cell: Any) -> None:
    torch.manual_seed(0)
    layer, x = cell(4, 5), torch.randn(3, 4)
    got, products = seen_by(layer, x)
    for mine, theirs in zip(flat(got), flat(layer(x)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert [product.weight for product in products] == [layer.weight_ih, layer.weight_hh]


class Tagger(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = KINDS[kind](8, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.recurrent(x)[0])
        return result


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def sequences(seed: int, used: slice) -> Tensor:
    x = torch.zeros(16, 6, 8)
    x[..., used].normal_(generator=torch.Generator().manual_seed(seed))
    return x


def test_statistics_are_those_of_inputs_states_and_errors() -> None:
    """Against a loop over cells, whose pre-activations can be asked for their gradients."""
    model = Tagger("gru").double()
    x, y = sequences(0, slice(0, 8)).double(), torch.zeros(16, 6, 4, dtype=torch.float64)
    memory = consolidate(model, [(x, y)], loss_fn=loss_of, dtype=torch.float64)
    layer = model.recurrent
    h = torch.zeros(16, 24, dtype=torch.float64)
    states, errors, outputs = [], [], []
    for t in range(6):
        states.append(h.detach())
        zh = nn.functional.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
        zh.retain_grad()
        errors.append(zh)
        zx = nn.functional.linear(x[:, t], layer.weight_ih_l0, layer.bias_ih_l0)
        (r, u, n), (hr, hu, hn) = zx.chunk(3, 1), zh.chunk(3, 1)
        new = (n + (r + hr).sigmoid() * hn).tanh()
        h = new + (u + hu).sigmoid() * (h - new)
        outputs.append(model.head(h))
    (torch.stack(outputs, 1) - y).square().mean().backward()
    seen = torch.cat(states)
    found = memory.layers["recurrent.weight_hh_l0"]
    K = seen.T @ seen / len(seen)
    torch.testing.assert_close(
        found.covariance.dense() * found.energy.double(), K, rtol=1e-6, atol=1e-9
    )
    delta = torch.cat([z.grad for z in errors]) * len(seen)  # type: ignore[misc]
    usage = (delta.square() * seen.square().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(found.usage, usage.float()[:, None])
    inputs = x.flatten(0, 1)
    found = memory.layers["recurrent.weight_ih_l0"]
    K = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(
        found.covariance.dense() * found.energy.double(), K, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_left_is_learned_and_the_old_answers_stay(kind: str) -> None:
    model = Tagger(kind).double()
    old = sequences(0, slice(0, 4)).double()
    new = sequences(1, slice(4, 8)).double(), torch.ones(16, 6, 4, dtype=torch.float64)
    before, first = model(old).detach(), float(loss_of(model, new).detach())
    memory = consolidate(model, [(old, before)], loss_fn=loss_of, dtype=torch.float64)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2}
    assert memory.layers.keys() == weights.keys()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model, new).backward()
        optimizer.step()
    assert float(loss_of(model, new).detach()) < 0.95 * first
    assert not torch.equal(model.recurrent.weight_ih_l0, weights["recurrent.weight_ih_l0"])
    torch.testing.assert_close(model(old), before, rtol=1e-5, atol=1e-6)
    assert max(guard.drift().values()) < 1e-9
