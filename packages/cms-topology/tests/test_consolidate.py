"""consolidate: the statistics are those of the data, and the model does not notice."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cms_topology import CMSBlockLinear, Consolidation, Covariance, consolidate


class Network(nn.Module):
    def __init__(self, tied: bool = True, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.fc1 = CMSBlockLinear(16, 32, tile_size=8, row_group=1)
        self.fc2 = nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.5)
        self.head = None if tied else nn.Linear(16, 12, bias=False)
        self.recompute = recompute

    def mlp(self, h: Tensor) -> Tensor:
        y = self.fc2(functional.relu(self.fc1(h)))
        return functional.relu_(y)  # in place, to make recording harder

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embedding(x)
        inner = checkpoint(self.mlp, h, use_reentrant=False) if self.recompute else self.mlp(h)
        h = h + self.dropout(inner)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = functional.linear(h, weight)
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


def batches(symbols: range = range(6), count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randint(symbols.start, symbols.stop, (4, 6), generator=generator)
        for _ in range(count)
    ]
    return [{"x": x, "labels": x.roll(1, 1)} for x in drawn]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_statistics_are_those_of_the_inputs_and_errors(tied: bool, recompute: bool) -> None:
    model = Network(tied, recompute)
    memory = consolidate(model, batches(), "a")
    model.eval()
    seen: dict[str, list[Tensor]] = {"fc1.values": [], "fc2.weight": [], "head": []}
    errors: list[Tensor] = []
    for batch in batches():
        h = model.embedding(batch["x"]).flatten(0, 1)
        y = model.fc1(h)
        y.retain_grad()
        a = functional.relu(y)
        top = h + functional.relu(model.fc2(a))
        weight = model.embedding.weight if model.head is None else model.head.weight
        loss = functional.cross_entropy(top @ weight.T, batch["labels"].flatten())
        loss.backward()
        assert y.grad is not None
        errors.append(y.grad * len(y))
        for name, x in zip(seen, (h, a, top), strict=True):
            seen[name].append(x.detach())
    model.zero_grad()
    head = "embedding.weight" if tied else "head.weight"
    assert set(memory.layers) == {"fc1.values", "fc2.weight", head}
    for name, parts in seen.items():
        x = torch.cat(parts).double()
        layer = memory.layers[head if name == "head" else name]
        K = x.T @ x / len(x)
        torch.testing.assert_close(layer.energy.double(), K.diagonal().mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            layer.covariance.dense(), K / K.diagonal().mean(), rtol=1e-5, atol=1e-6
        )
    x, delta = torch.cat(seen["fc1.values"]), torch.cat(errors)
    per_row = delta.view(-1, 4, 8).square().sum(2)
    per_column = x.view(-1, 2, 8).square().sum(2)
    usage = torch.einsum("tr,tc->rc", per_row, per_column) / len(x)
    layer = memory.layers["fc1.values"]
    torch.testing.assert_close(layer.usage, usage, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(layer.error, per_row.mean(0) / 8, rtol=1e-4, atol=1e-9)
    assert memory.layers["fc2.weight"].error.any()
    assert layer.live is not None
    assert layer.live.sum() == 4
    used = {int(t) for batch in batches() for t in batch["x"].flatten()}
    assert memory.rows["embedding.weight"].nonzero()[:, 0].tolist() == sorted(used)


@pytest.mark.parametrize("usage", ["loss", "sampled", "none"])
@pytest.mark.parametrize("influence", [False, True])
def test_the_model_does_not_notice(usage: str, influence: bool) -> None:
    model = Network()
    model.fc1.eval()  # modes differ within the model
    model.fc2.weight.requires_grad_(False)
    model.fc2.bias.grad = torch.ones(16)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    consolidate(model, batches(), "a", usage=usage, influence=influence)
    assert torch.equal(torch.get_rng_state(), random)
    for name, before in state.items():
        assert torch.equal(model.state_dict()[name], before), name
    assert [m.training for m in (model, model.fc1, model.fc2)] == [True, False, True]
    assert not model.fc2.weight.requires_grad
    assert torch.equal(model.fc2.bias.grad, torch.ones(16))
    assert model.fc1.values.grad is None
    assert model.fc1._probe.grad is None
    assert not model.fc1._forward_hooks


def test_influence_leaves_out_tokens_that_no_answer_depends_on() -> None:
    def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])["logits"][:, 2:4]

    model = Network()
    whole = batches(count=1)
    part = [{key: value[:, 2:4] for key, value in whole[0].items()}]
    kwargs: dict[str, Any] = {"usage": "none", "influence": True}
    a = consolidate(model, whole, outputs_fn=answers, **kwargs)
    kwargs["outputs_fn"] = lambda model, batch: model(batch["x"])["logits"]
    b = consolidate(model, part, **kwargs)
    for name in a.layers:
        # this network mixes no tokens and both draw the same noise, so the answers' tokens count
        # as if they were alone
        K, L = (m.layers[name].covariance.dense() for m in (a, b))
        torch.testing.assert_close(K, L, rtol=1e-4, atol=1e-5)


def test_sampled_labels_give_the_fisher_information() -> None:
    model = Network(tied=False)
    batch = batches(count=1)
    many = [batch[0]] * 200
    memory = consolidate(model, many, usage="sampled", sensitivity_batches=0)
    p = model.eval()(batch[0]["x"])["logits"].softmax(-1).flatten(0, 1)
    error = memory.layers["head.weight"].error
    torch.testing.assert_close(error, (p * (1 - p)).mean(0).detach(), rtol=0.15, atol=0.003)


def test_tasks_add_up() -> None:
    model = Network()
    a = consolidate(model, batches(range(4)), "a")
    b = consolidate(model, batches(range(5, 9)), "b", weight=2.0)
    both = consolidate(model, batches(range(5, 9)), "b", weight=2.0, previous=a)
    assert both.tasks == ["a", "b"]
    assert both.weights == [1.0, 2.0]
    for name, layer in both.layers.items():
        total = a.layers[name].covariance.dense() + b.layers[name].covariance.dense()
        torch.testing.assert_close(layer.covariance.dense(), total, rtol=1e-5, atol=1e-6)
        assert layer.covariance.diagonal().mean() == pytest.approx(3.0, rel=1e-5)
        mean = (a.layers[name].energy + 2 * b.layers[name].energy) / 3
        torch.testing.assert_close(layer.energy, mean)
    used = both.rows["embedding.weight"]
    assert torch.equal(used, a.rows["embedding.weight"] | b.rows["embedding.weight"])
    assert both.drift_rises.shape[0] == 2
    tolerated = [m.drift_at(0.01) for m in (a, b, both)]
    assert tolerated[2] == min(tolerated[0], tolerated[1])  # type: ignore[type-var]


@pytest.mark.parametrize("rank", [None, 3])
def test_memory_survives_a_safetensors_file(rank: int | None) -> None:
    model = Network()
    memory = consolidate(model, batches(), "a", rank=rank)
    tensors = load(save(memory.to_tensors()))
    assert memory.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    restored = Consolidation()
    restored.load_state_dict(tensors)
    assert restored.tasks == ["a"]
    assert restored.drift_at(0.01) == memory.drift_at(0.01)
    for name, tensor in memory.to_tensors().items():
        assert torch.equal(restored.to_tensors()[name], tensor), name


def test_a_foreign_file_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold 'about'"):
        Consolidation.from_tensors({"weight": torch.zeros(1)})
    tensors = Consolidation(tasks=["a"]).to_tensors()
    tensors["about"] = torch.tensor(list(b'{"version": 9}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"version \(=9\) of the consolidation must be 1"):
        Consolidation.from_tensors(tensors)


def test_sensitivity_rises_with_drift_and_sets_the_budget() -> None:
    memory = consolidate(Network(), batches(), "a")
    rises = memory.drift_rises[0]
    assert rises[-1] > rises[0]
    budgets = [memory.drift_at(nats) for nats in (1e-3, 1e-2, 1e-1)]
    assert budgets == sorted(budgets)  # type: ignore[type-var]
    assert budgets[0] < budgets[2]  # type: ignore[operator]
    assert consolidate(Network(), batches(), usage="none").drift_at(0.01) is None


def test_what_is_wrong_is_said() -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"usage \(='fisher'\) must be one of 'loss', 'sampled'"):
        consolidate(model, batches(), usage="fisher")
    with pytest.raises(ValueError, match=r"weight \(=0\) must be greater than 0"):
        consolidate(model, batches(), weight=0)
    with pytest.raises(ValueError, match=r"rank \(=0\) must be at least 1"):
        consolidate(model, batches(), rank=0)
    with pytest.raises(ValueError, match="reached no weight matrix of Network"):
        consolidate(model, [], "a")
    with pytest.raises(ValueError, match=r"loss_fn's result \(=\(4, 6, 12\)\) must be a scalar"):
        consolidate(model, batches(), loss_fn=lambda m, b: m(b["x"])["logits"])
    with pytest.raises(ValueError, match=r"batch \(=tuple\) must be a dict .* pass outputs_fn"):
        consolidate(nn.Linear(4, 4), [(torch.ones(2, 4),)], usage="sampled")
    with pytest.raises(
        ValueError, match=r"batch \(=list of 2\) must fit Linear\.forward \(too many"
    ):
        consolidate(nn.Linear(4, 4), [[torch.ones(2, 4), torch.ones(2)]])
    assert model.training  # also after an error


def test_what_a_tokenizer_returns_is_a_batch() -> None:
    wrapped = [UserDict(batch) for batch in batches()]
    found, expected = (consolidate(Network(), b, usage="sampled") for b in (wrapped, batches()))
    assert found.tasks == expected.tasks
    assert found.layers.keys() == expected.layers.keys()


def test_modules_beside_the_model_are_warned_of() -> None:
    body, head, teacher = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        h = model(x)
        with torch.no_grad():
            wanted = teacher(x)
        return head(h).square().mean() + (h - wanted).square().mean()

    with pytest.warns(
        UserWarning, match=r"depends on 2 parameters \(first of shape .* none of Lin"
    ):
        consolidate(body, [torch.randn(8, 4)], loss_fn=loss)


def test_complex_weights_count_as_unseen() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda _, __, y: y.abs())
    x = torch.randn(8, 4, dtype=torch.complex64)
    memory = consolidate(model, [x], loss_fn=lambda m, x: m(x).square().mean())
    assert memory.layers.keys() == {"1.weight"}
    assert memory.unseen == {"0.weight": "a product of complex numbers"}


def test_plain_batches_need_no_loss_without_error_signals() -> None:
    x = torch.randn(64, 4)
    memory = consolidate(nn.Linear(4, 2), [(x[:32],), x[32:]], usage="none")
    layer = memory.layers["weight"]
    assert layer.usage is None
    K = x.T @ x / 64
    torch.testing.assert_close(
        layer.covariance.dense(torch.float32), K / K.diagonal().mean(), rtol=1e-4, atol=1e-5
    )


def test_compiled_models_are_looked_into() -> None:
    model = Network(tied=False)
    expected = consolidate(model, batches(), "a").to_tensors()
    compiled = torch.compile(model, backend="eager")
    compiled(**batches()[0])
    found = consolidate(compiled, batches(), "a").to_tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 14))
@settings(max_examples=30, deadline=None)
def test_low_rank_keeps_trace_and_leading_directions(seed: int, n: int, rank: int) -> None:
    x = torch.randn(30, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = Covariance(x.T @ x / 30)
    low = whole.low_rank(rank)
    K, L = whole.dense(), low.dense()
    torch.testing.assert_close(L.trace(), K.trace())
    torch.testing.assert_close(
        torch.linalg.eigvalsh(L)[-rank:], torch.linalg.eigvalsh(K)[-rank:], rtol=1e-9, atol=1e-9
    )
    assert low.num_bytes <= whole.num_bytes
    columns = torch.tensor([[0, n - 1], [1, 0]])
    torch.testing.assert_close(low.restricted(columns)[1], L[columns[1]][:, columns[1]])
    doubled = low.plus(low).dense()
    torch.testing.assert_close(doubled, 2 * L, rtol=1e-9, atol=1e-9)
