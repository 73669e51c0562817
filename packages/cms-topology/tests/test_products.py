"""Products of parameters, however they are written; and weights that act in other ways besides."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import Consolidation, RetentionGuard, consolidate
from cms_topology._retention._capture import captured

Apply = Callable[[nn.Module, Tensor], Tensor]
N, M = 8, 12
SHAPES = {"rows": (M, N), "columns": (N, M), "experts": (3, N, 4), "experts first": (3, 4, N)}
"""Of the weight: outputs first, as of nn.Linear, or inputs first, as of GPT-2's Conv1D."""
WRITTEN: dict[str, tuple[str, Apply]] = {
    "x @ w": ("columns", lambda m, x: x @ m.w),
    "mm": ("columns", lambda m, x: torch.mm(x.flatten(0, 1), m.w).view(*x.shape[:-1], M)),
    "addmm": (
        "columns",
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).view(*x.shape[:-1], M),
    ),
    "einsum": ("rows", lambda m, x: torch.einsum("bti,oi->bto", x, m.w)),
    "einsum with dots": ("columns", lambda m, x: torch.einsum("... i, i o -> ... o", x, m.w)),
    "einsum, weight first": (
        "rows",
        lambda m, x: torch.einsum("oi,bti->tbo", m.w, x).transpose(0, 1),
    ),
    "mm of sparse inputs": (
        "columns",
        lambda m, x: torch.mm(x.flatten(0, 1).to_sparse(), m.w).view(*x.shape[:-1], M),
    ),
    "linear of w.T": ("columns", lambda m, x: functional.linear(x, m.w.T, m.b)),
    "x @ w.T": ("rows", lambda m, x: x @ m.w.T + m.b),
    "x @ w.t() cast": ("rows", lambda m, x: x @ m.w.to(x.dtype).clone().t()),
    "matmul of transposed": ("rows", lambda m, x: torch.matmul(x, m.w.transpose(0, 1))),
    "w @ x": ("rows", lambda m, x: (m.w @ x.mT).mT),
    "w.T @ x": ("columns", lambda m, x: (m.w.mT @ x.mT).mT),
    "experts": ("experts", lambda m, x: (x[:, None] @ m.w).transpose(1, 2).flatten(-2)),
    "experts by bmm": (
        "experts first",
        lambda m, x: (
            torch.bmm(x.flatten(0, 1).expand(3, -1, -1), m.w.transpose(1, 2))
            .transpose(0, 1)
            .reshape(*x.shape[:-1], M)
        ),
    ),
    "experts one by one": (
        "experts first",
        lambda m, x: torch.cat([functional.linear(x, m.w[i]) for i in torch.arange(3)], -1),
    ),
    "an expert's x @ w": (
        "experts",
        lambda m, x: torch.cat([x @ m.w[i] for i in range(3)], -1),
    ),
    "linear of slices": (
        "rows",
        lambda m, x: torch.cat([functional.linear(x, part) for part in m.w.chunk(3)], -1),
    ),
}


class Network(nn.Module):
    def __init__(self, kind: str, apply: Apply) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(SHAPES[kind]) * 0.3)
        self.b = nn.Parameter(torch.zeros(M))
        self.head = nn.Linear(M, 4)
        self.apply_ = apply

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.apply_(self, x).tanh())
        return result


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def batch_of(used: slice) -> tuple[Tensor, Tensor]:
    x = torch.zeros(5, 7, N)
    x[..., used].normal_(generator=torch.Generator().manual_seed(used.stop))
    return x, torch.ones(5, 7, 4)


OLD, NEW = batch_of(slice(0, 4)), batch_of(slice(4, 8))


@pytest.mark.parametrize("written", WRITTEN)
def test_products_are_seen_however_they_are_written(written: str) -> None:
    model = Network(*WRITTEN[written])
    with captured(model, lambda _: None, lambda *_: None, lambda _: None):
        seen = model(OLD[0])
    torch.testing.assert_close(seen, model(OLD[0]))
    memory = consolidate(model, [OLD], loss_fn=loss_of)
    x = OLD[0].flatten(0, 1).double()
    K = x.T @ x / len(x)
    assert memory.layers.keys() == {"w", "head.weight"}
    found = memory.layers["w"]
    groups = 3 if "slices" in written or "expert" in written else 1
    got = found.covariance.dense().view(groups, N, N) * found.energy.double()
    torch.testing.assert_close(got, K.expand(groups, N, N), rtol=1e-5, atol=1e-6)
    assert found.usage is not None
    assert found.usage.shape == (M, 1)
    restored = Consolidation.from_tensors(load(save(memory.to_tensors())))
    assert restored.layers["w"].layout == found.layout

    before, first = model(OLD[0]).detach(), float(loss_of(model, NEW).detach())
    w = model.w.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    guard = RetentionGuard(model, optimizer, restored, drift=None, eps=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, NEW).backward()
        optimizer.step()
    assert float(loss_of(model, NEW).detach()) < 0.97 * first
    assert not torch.equal(model.w, w)
    torch.testing.assert_close(model(OLD[0]), before, rtol=0, atol=1e-5)
    assert max(guard.drift().values()) < 1e-9


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch 2.8")
@pytest.mark.parametrize("kind", ["experts", "experts first"])
def test_experts_of_consecutive_tokens_have_statistics_of_their_own(kind: str) -> None:
    def apply(model: nn.Module, x: Tensor) -> Tensor:
        w: Tensor = model.w  # type: ignore[assignment]
        return sorted_by_expert(x, w if kind == "experts" else w.transpose(1, 2))

    model, x = Network(kind, apply).bfloat16(), torch.randn(5, 7, N).bfloat16()
    model.w = nn.Parameter(torch.randn(3, N, N).bfloat16())
    batch = x, torch.ones(5, 7, 4).bfloat16()
    memory = consolidate(model, [batch], loss_fn=lambda m, b: loss_of(m, b).float())
    found = memory.layers["w"]
    flat = x.flatten(0, 1).double()
    want = torch.stack([p.T @ p / len(p) for p in (flat[:10], flat[10:24], flat[24:])])
    got = found.covariance.dense() * found.energy.double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert found.layout == (3, kind == "experts", True)
    assert RetentionGuard(model, None, memory, drift=1e-3).drift()["w"] == 0


OTHERWISE: dict[str, tuple[Apply, str]] = {
    "tied to its transpose": (
        lambda m, x: functional.linear(functional.linear(x, m.w).tanh(), m.w.T) @ m.w.T,
        "its transpose",
    ),
    "scaled too": (
        lambda m, x: functional.linear(x, m.w) + functional.linear(x, m.w * 0.5),
        "linear of what is computed of it",
    ),
    "masked": (
        lambda m, x: functional.linear(x, m.w) + functional.linear(x, m.w * x[0, 0]),
        "mul",
    ),
    "divided by its norm": (lambda m, x: functional.linear(x, m.w) / m.w.norm(), "__truediv__"),
    "bilinear": (lambda m, x: torch.einsum("bti,oi,bti->bto", x, m.w, x), "einsum"),
    "summed over what stays": (
        lambda m, x: torch.einsum("bti,oi->to", x, m.w).expand(5, 7, M),
        "einsum",
    ),
    "written into another": (
        lambda m, x: functional.linear(x, m.w) + written_into(m, x),
        "__setitem__",
    ),
}


def sorted_by_expert(x: Tensor, w: Tensor) -> Tensor:
    offsets = torch.tensor([10, 24, 35], dtype=torch.int32)
    y: Tensor = torch._grouped_mm(x.flatten(0, 1), w, offs=offsets)
    return y.view(*x.shape[:-1], N).repeat(1, 1, 2)[..., :M]


def written_into(model: nn.Module, x: Tensor) -> Tensor:
    whole = torch.zeros(M, N)
    whole[:] = model.w
    return functional.linear(x, whole)


@pytest.mark.parametrize("written", OTHERWISE)
def test_a_weight_that_acts_in_another_way_too_stays(written: str) -> None:
    """Its inputs there are not known, so the seen ones must not speak for it."""
    apply, function = OTHERWISE[written]
    model = Network("rows", apply)
    memory = consolidate(model, [OLD], loss_fn=loss_of)
    assert "w" not in memory.layers
    assert "w" in memory.unseen
    if function != "__truediv__":  # spelled differently by torch's versions
        assert memory.unseen["w"] == function
    before = model.w.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard = RetentionGuard(model, optimizer, memory)
    assert guard.metrics()["retention/drift_max"] == 0
    loss_of(model, NEW).backward()
    if function == "mul":
        optimizer.step()
    else:
        with pytest.warns(
            UserWarning, match=r"weights stay as they are: 1 used by .*\(first 'w'\)"
        ):
            optimizer.step()
    assert "w" in guard.still
    assert torch.equal(model.w, before)


UNTOUCHED: dict[str, Apply] = {
    "shape and type only": lambda m, x: functional.linear(x.to(m.w.dtype), m.w)[..., : len(m.w)],
    "as an input, changed in place": lambda m, x: functional.linear(
        m.b[:N].repeat(5, 7, 1).add_(x), m.w
    ),
    "zeros of its kind": lambda m, x: functional.linear(x, m.w) + m.w.new_zeros(M).add(0),
}


@pytest.mark.parametrize("written", UNTOUCHED)
def test_asking_a_weight_for_its_kind_is_no_use(written: str) -> None:
    memory = consolidate(Network("rows", UNTOUCHED[written]), [OLD], loss_fn=loss_of)
    assert "w" in memory.layers
    assert not memory.unseen


def test_a_penalty_on_weights_in_the_loss_is_no_use() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch) + 1e-4 * sum(
            p.square().sum() + p.norm() for p in model.parameters()
        )

    memory = consolidate(Network(*WRITTEN["x @ w.T"]), [OLD], loss_fn=penalised)
    assert memory.layers.keys() == {"w", "head.weight"}


def test_what_one_task_used_unseen_stays_although_another_used_it_as_a_product() -> None:
    model = Network("rows", OTHERWISE["bilinear"][0])
    first = consolidate(model, [OLD], "a", loss_fn=loss_of)
    model.apply_ = WRITTEN["x @ w.T"][1]
    second = consolidate(model, [NEW], "b", loss_fn=loss_of)
    assert "w" in second.layers
    for both in (first.plus(second), second.plus(first)):
        assert "w" not in both.layers
        assert "w" in RetentionGuard(model, None, both, drift=1e-3).still
    model.apply_ = lambda m, x: x.flip(-1).repeat(1, 1, 2)[..., :M] @ m.w @ m.w.T
    third = consolidate(model, [(torch.ones(2, 3, N), torch.ones(2, 3, 4))], "c", loss_fn=loss_of)
    assert third.unseen["w"] == "its transpose"


def test_a_head_that_multiplies_with_the_embedding_transposed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.fc(self.embedding(x)).tanh()
            return h @ self.embedding.weight.T

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())

    model = Tied()
    old, new = (torch.randint(low, low + 10, (8, 6)) for low in (0, 10))
    memory = consolidate(model, [old], loss_fn=loss)
    assert memory.layers.keys() == {"embedding.weight", "fc.weight"}
    before = model(old).detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    RetentionGuard(model, optimizer, memory, drift=None, eps=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model, new).backward()
        optimizer.step()
    torch.testing.assert_close(model(old), before, rtol=0, atol=1e-4)


class FusedHead(torch.autograd.Function):
    """A head fused with its loss, which no function mode is shown."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return (h @ weight).square().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        error = 2 * gradients[0] * (h @ weight) / (len(h) * weight.shape[1])
        return error @ weight.T, h.T @ error


def test_an_embedding_that_is_the_weight_of_a_fused_head_stays_whole() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = FusedHead.apply(model(x), model[0].weight.T)  # type: ignore[index]
        return result

    memory = consolidate(model, [torch.arange(4)], loss_fn=loss)
    assert memory.layers.keys() == {"1.weight"}
    assert not memory.rows
    assert memory.unseen == {"0.weight": "FusedHead"}


def test_embeddings_in_bags_and_soft_look_ups() -> None:
    """Rows of a bag count as looked up; probabilities times an embedding are a product, whose
    inputs are the rows."""
    bag = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 4))
    memory = consolidate(bag, [torch.tensor([[1, 2], [3, 2]])], loss_fn=lambda m, x: m(x).mean())
    assert memory.rows["0.weight"].nonzero()[:, 0].tolist() == [1, 2, 3]

    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)

        def forward(self, x: Tensor) -> Tensor:
            hard = self.embedding(x)
            soft = functional.one_hot(x, 10).float() @ self.embedding.weight
            result: Tensor = hard + soft
            return result

    model = Soft()
    memory = consolidate(model, [torch.tensor([[1, 2]])], loss_fn=lambda m, x: m(x).mean())
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    RetentionGuard(model, optimizer, memory, drift=0.5)
    before = model.embedding.weight.detach().clone()
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    moved = (model.embedding.weight != before).any(1)
    assert moved.tolist() == [True, False, False, *[True] * 7]


def test_features_computed_without_gradients_are_seen() -> None:
    def frozen(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ model.w  # type: ignore[operator]

    memory = consolidate(Network("columns", frozen), [OLD], loss_fn=loss_of)
    assert memory.layers.keys() == {"w", "head.weight"}
    assert not memory.layers["w"].usage.any()  # type: ignore[union-attr]


def test_low_rank_groups() -> None:
    model = Network(*WRITTEN["linear of slices"])
    memory = consolidate(model, [OLD], loss_fn=loss_of, rank=4)
    whole = consolidate(model, [OLD], loss_fn=loss_of)
    layers = [m.layers["w"].covariance for m in (memory, whole)]
    assert layers[0].vectors is not None
    assert layers[0].vectors.shape == (3, N, 4)
    # four inputs hold everything
    torch.testing.assert_close(layers[0].dense(), layers[1].dense(), rtol=1e-5, atol=1e-5)
    guard = RetentionGuard(model, None, memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.step()


class EveryKind(nn.Module):
    """A layer of each layout: groups, transposed kernels, inputs first, slices, steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose1d(8, N, 3, groups=2, padding=1)
        self.w = nn.Parameter(torch.randn(N, M) * 0.3)
        self.attention = nn.MultiheadAttention(M, 2, batch_first=True)
        self.recurrent = nn.GRU(M, 10, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.conv(x).relu()).transpose(1, 2) @ self.w
        other = h.flip(1)
        h = self.attention(h, other, other, need_weights=False)[0]
        result: Tensor = self.head(self.recurrent(h)[0])
        return result


def test_every_layout_resumes_to_the_bit_in_mid_interval() -> None:
    x, y = torch.randn(8, 4, 6), torch.randn(8, 6, 4)

    def setup(model: nn.Module, memory: Consolidation) -> tuple[Any, RetentionGuard]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return optimizer, RetentionGuard(model, optimizer, memory, drift=1e-3, every=3)

    def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model, (x.roll(step, 0) + step, y)).backward()
            optimizer.step()

    model = EveryKind()
    memory = consolidate(model, [(x, y)], loss_fn=loss_of)
    assert len(memory.layers) == 8
    optimizer, guard = setup(model, memory)
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    train(model, optimizer, 4, 9)
    assert 5e-4 < max(guard.drift().values()) <= 1e-3 * (1 + 1e-4)

    other = EveryKind()
    other.load_state_dict(saved[0])
    resumed, guard = setup(other, Consolidation.from_tensors(memory.to_tensors()))
    resumed.load_state_dict(saved[1])
    guard.load_state_dict(saved[2])
    train(other, resumed, 4, 9)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
