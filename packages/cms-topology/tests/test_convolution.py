"""Convolutions under retention: windows as tokens, kernels projected like matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import RetentionGuard, consolidate
from cms_topology._retention._convolution import Convolution, TransposedConvolution
from cms_topology._retention._layout import Layout

CALLS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED_CALLS: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=40)
@given(
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    groups=st.sampled_from([1, 2, 3, 6]),
    batched=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_windows_times_kernels_are_the_convolution(
    dims: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int | str,
    groups: int,
    batched: bool,
    seed: int,
) -> None:
    if padding == "same":
        stride = 1  # torch knows no other
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, 6, *(5 + i for i in range(dims)))
    x = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    x = x if batched else x[0]
    shape = (12, 6 // groups, *(kernel,) * dims)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    call = Convolution(x, weight, None, stride, padding, dilation, groups)
    y = CALLS[dims](x, weight, None, stride, padding, dilation, groups)
    check_rows(call.windows(x), weight, Layout(groups), y, dims)


@settings(deadline=None, max_examples=40)
@given(
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 4),
    more=st.integers(0, 2),
    groups=st.sampled_from([1, 2, 3, 6]),
    batched=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_windows_times_turned_kernels_are_the_transposed_convolution(
    dims: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    more: int,
    groups: int,
    batched: bool,
    seed: int,
) -> None:
    more = min(more, max(stride, dilation) - 1)  # torch allows no more
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, 6, *(6 + i for i in range(dims)))
    x = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    x = x if batched else x[0]
    weight = torch.randn(6, 4, *(kernel,) * dims, generator=generator, dtype=torch.float64)
    arguments = (weight, None, stride, padding, more, groups, dilation)
    try:
        y = TRANSPOSED_CALLS[dims](x, *arguments)
    except RuntimeError:  # nothing is left within the padding
        return
    windows = TransposedConvolution(x, *arguments).windows(x)
    check_rows(windows, weight, Layout(groups, inputs_first=True), y, dims)


def check_rows(windows: Tensor, weight: Tensor, layout: Layout, y: Tensor, dims: int) -> None:
    """The layout's matrices times the windows are the output; and back."""
    matrices = layout.matrices(weight)
    assert matrices.shape == layout.shape(weight.shape)
    each = windows.view(len(windows), layout.groups, -1)
    rows = torch.einsum("pgn,gmn->pgm", each, matrices).flatten(1)
    torch.testing.assert_close(rows, y.movedim(-1 - dims, -1).reshape(-1, rows.shape[1]))
    assert torch.equal(layout.parameter(matrices, weight.shape), weight)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 12, 3, padding="same")
        self.second = nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.second(functional.gelu(self.first(x))))
        result: Tensor = self.head(h.mean((2, 3)))
        return result


class Separable(nn.Module):
    """Depthwise, grouped and transposed convolutions, as in MobileNet, ResNeXt and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.Conv2d(3, 6, 3, padding=1, groups=3, padding_mode="reflect")
        self.pointwise = nn.Conv2d(6, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, output_padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.pointwise(self.depthwise(x)))
        h = functional.gelu(self.up(functional.gelu(self.grouped(h))))
        result: Tensor = self.head(h.mean((2, 3)))
        return result


def pictures(seed: int, channels: slice) -> Tensor:
    """Only some channels hold something, so that others are left to learn with."""
    x = torch.zeros(16, 3, 8, 8)
    chosen = x[:, channels]
    chosen.normal_(generator=torch.Generator().manual_seed(seed))
    return x


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return functional.cross_entropy(model(x), labels)


OLD = [(pictures(s, slice(0, 1)), torch.arange(16) % 5) for s in range(2)]
NEW = [(pictures(9 + s, slice(1, 3)), torch.arange(16) % 3) for s in range(2)]


def train(model: nn.Module, steps: int, **kwargs: Any) -> tuple[RetentionGuard, float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    memory = consolidate(model, OLD, "a", loss_fn=loss_of)
    guard = RetentionGuard(model, optimizer, memory, **kwargs)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, NEW[step % 2])
        loss.backward()
        optimizer.step()
    return guard, float(loss.detach())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_left_is_learned_and_the_old_answers_stay(
    gradients: bool, channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Network().double().to(memory_format=layout)
    double = [(x.double(), labels) for x, labels in OLD]
    first = float(loss_of(model, (NEW[0][0].double(), NEW[0][1])).detach())
    before = [model(x).detach() for x, _ in double]
    memory = consolidate(model, double, "a", loss_fn=loss_of, dtype=torch.float64)
    assert sorted(memory.layers) == ["first.weight", "head.weight", "second.weight"]
    assert memory.layers["first.weight"].covariance.n == 27
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0, gradients=gradients)
    assert guard.still == ["first.bias", "second.bias", "head.bias"]
    kernels = model.first.weight.detach().clone()
    for step in range(40):
        x, labels = NEW[step % 2]
        optimizer.zero_grad()
        loss_of(model, (x.double(), labels)).backward()
        optimizer.step()
    assert float(loss_of(model, (NEW[0][0].double(), NEW[0][1])).detach()) < first - 0.1
    assert not torch.equal(model.first.weight, kernels)
    assert model.first.weight.is_contiguous(memory_format=layout)
    for (x, _), answer in zip(double, before, strict=True):
        torch.testing.assert_close(model(x), answer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_groups_and_transposed_kernels_learn_what_they_may(gradients: bool) -> None:
    model = Separable().double()
    old = [(x.double(), labels) for x, labels in OLD]
    new = NEW[0][0].double()
    first = float((model(new) - 1).square().mean().detach())
    before = [model(x).detach() for x, _ in old]
    memory = consolidate(model, old, "a", loss_fn=loss_of, dtype=torch.float64)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    assert memory.layers.keys() == weights.keys()
    assert memory.layers["depthwise.weight"].covariance.dense().shape == (3, 9, 9)
    assert memory.layers["up.weight"].covariance.dense().shape == (2, 54, 54)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0, gradients=gradients)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(new) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first
    # the old task uses all of the first channel's kernel, and nothing of the other channels'
    moved = (model.depthwise.weight - weights["depthwise.weight"]).flatten(1).norm(dim=1)
    assert (moved[:2] < 1e-9).all()
    assert (moved[2:] > 1e-3).all()
    for (x, _), answer in zip(old, before, strict=True):
        torch.testing.assert_close(model(x), answer, rtol=1e-6, atol=1e-6)
    assert max(guard.drift().values()) < 1e-9


def test_drift_of_grouped_kernels_is_the_error_of_their_outputs() -> None:
    model = Separable()
    before = {name: getattr(model, name).weight.detach().clone() for name in ("grouped", "up")}
    inputs: dict[str, Tensor] = {}
    for name in before:
        getattr(model, name).register_forward_hook(
            lambda _, args, __, name=name: inputs.update({name: args[0].detach()})
        )
    memory = consolidate(model, OLD[:1], "a", loss_fn=loss_of)
    loss_of(model, OLD[0])
    seen = dict(inputs)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    guard = RetentionGuard(model, optimizer, memory, drift=1e-2)
    for step in range(5):
        loss_of(model, NEW[step % 2]).backward()
        optimizer.step()
    for name, weight in before.items():
        layer, drift = getattr(model, name), guard.drift()[f"{name}.weight"]
        now = layer(seen[name]) - layer.bias[:, None, None]
        layer.weight.data = weight
        then = layer(seen[name]) - layer.bias[:, None, None]
        error = float(((now - then).square().sum() / then.square().sum()).detach())
        assert drift == pytest.approx(error, rel=1e-2), name
        assert 1e-4 < drift <= 1.001e-2, name


def test_usage_of_groups_is_that_of_their_own_inputs() -> None:
    model = Separable().double()
    x, labels = OLD[0][0].double(), OLD[0][1]
    memory = consolidate(model, [(x, labels)], "a", loss_fn=loss_of)
    seen: list[Tensor] = []
    model.depthwise.register_forward_hook(lambda *a: (a[2].retain_grad(), seen.append(a[2]))[0])
    loss_of(model, (x, labels)).backward()
    delta = seen[0].grad.movedim(1, -1).reshape(-1, 3, 2) * (16 * 64)  # type: ignore[union-attr]
    padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    windows = functional.unfold(padded, 3).movedim(1, -1).reshape(-1, 3, 9)
    usage = (delta.square() * windows.square().sum(2, keepdim=True)).mean(0)
    found = memory.layers["depthwise.weight"].usage
    torch.testing.assert_close(found, usage.reshape(6, 1).float())


def test_drift_of_convolutions_stays_within_its_budget() -> None:
    guard, _ = train(Network(), 20, drift=1e-3)
    drifts = guard.drift()
    assert sorted(drifts) == ["first.weight", "head.weight", "second.weight"]
    assert max(drifts.values()) <= 1.001e-3
    assert max(drifts.values()) > 1e-4


def test_usage_is_that_of_the_output_channels() -> None:
    """Against per-position gradients of the loss, taken one by one."""
    model = Network().double()
    x, labels = OLD[0][0].double(), OLD[0][1]
    memory = consolidate(model, [(x, labels)], "a", loss_fn=loss_of)
    seen: list[Tensor] = []
    model.first.register_forward_hook(lambda *a: (a[2].retain_grad(), seen.append(a[2]))[0])
    loss_of(model, (x, labels)).backward()
    delta = seen[0].grad.movedim(1, -1).reshape(-1, 12) * (16 * 64)  # type: ignore[union-attr]
    windows = functional.unfold(x, 3, padding=1).movedim(1, -1).reshape(-1, 27)
    usage = (delta.square()[:, :, None] * windows.square().sum(1)[:, None, None]).mean(0)
    torch.testing.assert_close(memory.layers["first.weight"].usage, usage.float())
