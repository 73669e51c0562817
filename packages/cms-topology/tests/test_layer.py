"""CMSBlockLinear as a drop-in nn.Linear."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager, accumulate_scores


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (2, 0, 96), (0, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer = CMSBlockLinear(96, 64, bias, tile_size=8, density=0.5)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 64)
    torch.testing.assert_close(
        y, torch.nn.functional.linear(x, layer.to_dense(), layer.bias), atol=1e-5, rtol=1e-4
    )
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tile_size", [8, 16, 32])
def test_full_density_equals_linear(dtype: torch.dtype, tolerance: float, tile_size: int) -> None:
    linear = nn.Linear(96, 64, dtype=dtype)
    layer = CMSBlockLinear.from_dense(linear, tile_size=tile_size, density=1.0)
    assert torch.equal(layer.to_dense(), linear.weight)
    x1 = torch.randn(33, 96, dtype=dtype, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    y1, y2 = linear(x1), layer(x2)
    g = torch.randn_like(y1)
    y1.backward(g)
    y2.backward(g)
    grads = layer.to_dense()  # only its shape: gradients are compared through the same blocks
    dense_grad = torch.zeros_like(grads)
    for r in range(layer.R):
        for k in range(layer.K):
            c = int(layer.col_indices[r, k])
            B = layer.B
            dense_grad[r * B : r * B + B, c * B : c * B + B] = layer.values.grad[r, k]  # type: ignore[index]

    def close(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
        scale = float(b.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, scale), name

    close(y2, y1, "output")
    close(x2.grad, x1.grad, "grad of x")  # type: ignore[arg-type]
    close(dense_grad, linear.weight.grad, "grad of weight")  # type: ignore[arg-type]
    close(layer.bias.grad, linear.bias.grad, "grad of bias")  # type: ignore[arg-type, union-attr]


def test_gradcheck() -> None:
    layer = CMSBlockLinear(24, 16, tile_size=8, density=0.67, dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.values, layer.bias))


def test_initial_output_variance_is_that_of_linear() -> None:
    x = torch.randn(512, 640)
    with torch.no_grad():
        dense = nn.Linear(640, 1280, bias=False)(x).var()
        for density in (0.1, 0.5, 1.0):
            layer = CMSBlockLinear(640, 1280, bias=False, density=density)
            assert float(layer(x).var() / dense) == pytest.approx(1.0, abs=0.05)


def test_density_is_the_actual_one() -> None:
    layer = CMSBlockLinear(48, 32, density=0.4)
    assert layer.get_density() == layer.density == 1 / 3
    assert layer.get_topology_stats().density == 1 / 3
    assert CMSBlockLinear(48, 32, density=0.01).density == 1 / 3, "never below one block"


def test_row_group_auto() -> None:
    assert CMSBlockLinear(128, 512, tile_size=16).row_group == 8
    assert CMSBlockLinear(128, 48, tile_size=16).row_group == 3
    assert CMSBlockLinear(128, 256, tile_size=128).row_group == 1
    assert CMSBlockLinear(128, 7 * 16, tile_size=16).row_group == 7
    assert CMSBlockLinear(128, 11 * 16, tile_size=16).row_group == 1
    layer = CMSBlockLinear(128, 512, tile_size=16)
    first = layer.col_indices.view(4, 8, -1)[:, :1]
    assert torch.equal(first.expand(4, 8, -1), layer.col_indices.view(4, 8, -1))


def test_same_seed_same_layer() -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append(CMSBlockLinear(96, 64, tile_size=8))
        layers.append(
            CMSBlockLinear(96, 64, tile_size=8, generator=torch.Generator().manual_seed(9))
        )
    for a, b in ((layers[0], layers[2]), (layers[1], layers[3])):
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.col_indices, b.col_indices)
    assert not torch.equal(layers[0].col_indices, layers[1].col_indices)


class Parent(nn.Module):
    def __init__(self, seed: int, **kwargs: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(
            CMSBlockLinear(96, 64, tile_size=8, **kwargs),  # type: ignore[arg-type]
            nn.ReLU(),
            CMSBlockLinear(64, 96, tile_size=8, row_group=1, **kwargs),  # type: ignore[arg-type]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def trained(parent: Parent) -> Parent:
    for _ in range(3):
        parent.zero_grad()
        parent(torch.randn(8, 96)).square().sum().backward()
        for layer in (parent.inner[0], parent.inner[2]):
            layer.accumulate_scores()
    for layer in (parent.inner[0], parent.inner[2]):
        layer.topology_step(global_step=3)
    parent.zero_grad()
    return parent


@pytest.mark.parametrize("through", ["torch.save", "safetensors", "memory"])
def test_state_dict_strict_nested_with_another_topology(through: str) -> None:
    source, target = trained(Parent(1)), Parent(2)
    state = source.state_dict()
    if through == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    elif through == "safetensors":
        state = safetensors_load(safetensors_save(dict(state)))
    x = torch.randn(4, 96)
    assert not torch.equal(source(x), target(x))
    result = target.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(source(x), target(x))
    for (name, a), (_, b) in zip(
        source.state_dict().items(), target.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    # the decision after it is the same one, too
    for p in (source, target):
        torch.manual_seed(11)
        trained(p)
    assert torch.equal(source.inner[2].col_indices, target.inner[2].col_indices)
    assert torch.equal(source.inner[2].values, target.inner[2].values)


def test_load_restores_the_number_of_live_blocks() -> None:
    source = Parent(1, density=0.25, max_density=0.75)
    source.inner[0].grow(0.5)
    target = Parent(2, density=0.25, max_density=0.75)
    target.load_state_dict(source.state_dict())
    assert target.inner[0].density == 0.5
    assert target.inner[2].density == 0.25
    x = torch.randn(4, 96)
    assert torch.equal(source(x), target(x))


def test_load_rejects_a_broken_topology() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8, row_group=1)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["col_indices"][3, 1] = state["col_indices"][3, 0]
    with pytest.raises(ValueError, match=r"row 3"):
        layer.load_state_dict(state)
    state["col_indices"][3, 1] = 99
    with pytest.raises(ValueError, match=r"99"):
        layer.load_state_dict(state)


def test_indices_written_behind_our_back_are_checked_at_the_next_forward() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8, row_group=1)
    with torch.no_grad():
        layer.col_indices[0, 0] = 99
    with pytest.raises(ValueError, match=r"99"):
        layer(torch.randn(2, 96))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: _pickle(m)])
def test_deepcopy_and_pickle(
    copier: Callable[[CMSBlockLinear], CMSBlockLinear],
    trained_layer: Callable[..., CMSBlockLinear],
) -> None:
    layer = trained_layer()
    twin = copier(layer)
    x = torch.randn(4, 96)
    assert torch.equal(layer(x), twin(x))
    a = layer.topology_step(global_step=7)
    assert torch.equal(twin(x), copier(twin)(x))
    b = twin.topology_step(global_step=7)
    assert a.num_swaps == b.num_swaps > 0
    assert torch.equal(layer.values, twin.values)
    assert layer.values.data_ptr() != twin.values.data_ptr()
    assert layer.topology_checksum() == twin.topology_checksum()


def _pickle(module: CMSBlockLinear) -> CMSBlockLinear:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_to_dtype_and_back(trained_layer: Callable[..., CMSBlockLinear]) -> None:
    layer = trained_layer()
    scores = layer.block_scores()
    layer.to(torch.bfloat16)
    assert layer.values.dtype == torch.bfloat16
    assert layer.col_indices.dtype == torch.int32
    assert torch.equal(layer.block_scores(), scores)
    y = layer(torch.randn(4, 96, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    layer.accumulate_scores()
    assert layer.topology_step(global_step=1).num_swaps > 0


def test_meta_device_then_real() -> None:
    with torch.device("meta"):
        layer = CMSBlockLinear(96, 64, tile_size=8)
    assert layer.values.device.type == "meta"
    assert layer(torch.randn(3, 96, device="meta")).shape == (3, 64)
    layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    y = layer(torch.randn(3, 96))
    assert y.isfinite().all()
    assert layer.scorer.block_age.eq(0).all()


def test_autocast() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 96))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


def test_from_dense_keeps_the_largest_blocks() -> None:
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.mul_(0.01)
        for r, columns in enumerate(((1, 6), (0, 3), (2, 7), (4, 5))):
            for c in columns:
                linear.weight[8 * r : 8 * r + 8, 8 * c : 8 * c + 8] += 1.0
    layer = CMSBlockLinear.from_dense(linear, tile_size=8, density=0.25, row_group=1)
    assert [sorted(row) for row in layer.col_indices.tolist()] == [[1, 6], [0, 3], [2, 7], [4, 5]]
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.to_dense())
    linear.eval()
    assert not CMSBlockLinear.from_dense(linear, tile_size=8).training


def test_extra_repr() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8, density=0.5, max_density=0.75)
    assert (
        "CMSBlockLinear(\n  in_features=96, out_features=64, bias=True, tile_size=8, density=0.5, "
        "row_group=8, spare=3" in repr(layer)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_features": 650},
            r"in_features \(=650\) must be a multiple of tile_size \(=16\); nearest: 640 or 656\.",
        ),
        (
            {"out_features": 8},
            r"out_features \(=8\) must be a multiple of tile_size \(=16\); nearest: 16\.",
        ),
        ({"in_features": 0}, r"in_features \(=0\) must be a multiple"),
        ({"tile_size": 12}, r"tile_size \(=12\) must be one of \(8, 16, 32, 64, 128\)"),
        ({"density": 0.0}, r"density \(=0\.0\)"),
        ({"density": 1.5}, r"density \(=1\.5\)"),
        ({"density": math.nan}, r"density \(=nan\)"),
        ({"density": 0.5, "max_density": 0.25}, r"max_density \(=0\.25\) must be at least density"),
        ({"row_group": 3}, r"row_group \(=3\) must be 'auto' or a divisor .* \(=4\); .* \[1, 2, 4"),
        ({"row_group": "all"}, r"row_group \(='all'\) must be 'auto'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"in_features": 64, "out_features": 64}
    with pytest.raises(ValueError, match=message):
        CMSBlockLinear(**{**good, **arguments})  # type: ignore[arg-type]


def test_bad_input() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8)
    with pytest.raises(ValueError, match=r"95"):
        layer(torch.randn(2, 95))
    with pytest.raises(ValueError, match=r"float64"):
        layer(torch.randn(2, 96, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"meta"):
        layer(torch.randn(2, 96, device="meta"))


def test_nan_input_is_seen_as_in_dense() -> None:
    layer = CMSBlockLinear(96, 64, tile_size=8, density=1.0)
    x = torch.randn(3, 96)
    x[1, 5] = math.nan
    assert layer(x).isnan().any(1).tolist() == [False, True, False]


def test_statistics(trained_layer: Callable[..., CMSBlockLinear]) -> None:
    layer = trained_layer(steps=5)
    stats = layer.get_topology_stats()
    assert stats.num_blocks == 8 * 6
    assert stats.avg_block_age == 5.0
    assert stats.avg_block_score > 0
    assert 0.0 <= stats.column_entropy <= 1.0
    layer.topology_step(global_step=5)
    histogram = layer.get_block_age_distribution(bins=5)
    assert histogram.counts.sum() == 48
    assert histogram.counts[0] > 0
    assert histogram.edges_steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(layer.swap_rates()) == 1
    with pytest.raises(ValueError, match=r"bins \(=0\) must be at least 1"):
        layer.get_block_age_distribution(0)
    fresh = CMSBlockLinear(96, 64, tile_size=8, scoring=ScoringConfig(keep_score="magnitude"))
    assert fresh.get_topology_stats().avg_block_score > 0
    assert CMSBlockLinear(96, 64, tile_size=8).get_topology_stats().avg_block_score == 0.0


@pytest.mark.parametrize(
    "by_hand", [lambda x: x.accumulate_scores(), lambda x: accumulate_scores([x])]
)
def test_who_scores_by_hand_gets_statistics(
    by_hand: Callable[[CMSBlockLinear], object],
) -> None:
    layer = CMSBlockLinear(32, 48, tile_size=8)
    for _ in range(2):
        layer(torch.randn(5, 32)).sum().backward()
        by_hand(layer)
        layer.zero_grad()
    layer.score_step()
    assert layer.scorer.num_samples == 1


def test_nothing_is_collected_before_somebody_scores() -> None:
    """A layer whose blocks stay does not pay for statistics of absent ones."""
    layer, x = CMSBlockLinear(32, 48, tile_size=8), torch.randn(5, 32)

    def collected(layer: CMSBlockLinear) -> bool:
        layer.zero_grad()
        layer._probe.grad = None
        layer(x).sum().backward()
        return layer._probe.grad is not None

    assert not collected(layer)
    layer.accumulate_scores()
    assert collected(layer)
    again, fresh = CMSBlockLinear(32, 48, tile_size=8), CMSBlockLinear(32, 48, tile_size=8)
    again.load_state_dict(layer.state_dict())
    assert collected(again), "what was scored by hand goes on as it was"
    again.load_state_dict(fresh.state_dict())
    fresh.load_state_dict(CMSBlockLinear(32, 48, tile_size=8).state_dict())
    assert not collected(fresh)
    managed = CMSBlockLinear(32, 48, tile_size=8)
    TopologyManager(managed)
    managed.load_state_dict(layer.state_dict())
    assert not collected(managed), "the manager says when"
    layer.collect_candidates = False
    layer.accumulate_scores()
    assert not collected(layer), "switched off by hand, it stays off"


@pytest.mark.parametrize("score", ["gradient", "loss"])
def test_function_transforms_while_candidates_are_collected(score: str) -> None:
    """Gradients per sample of a layer that is in its sampling phase; its probes stay out of it."""
    config = ScoringConfig(candidate_score=score, keep_score=score)
    layer = CMSBlockLinear(32, 16, tile_size=8, scoring=config)
    layer.collect_candidates = True
    x = torch.randn(3, 32)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(each["values"].sum(0), layer.values.grad)
    torch.testing.assert_close(each["bias"].sum(0), layer.bias.grad)


def test_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last dimension of x \(=none, a scalar\)"):
        CMSBlockLinear(32, 16, tile_size=8)(torch.tensor(1.0))


def test_a_cast_layer_may_go_through_a_transform_first() -> None:
    """Indices are checked anew after a cast, here inside the transform."""
    layer = CMSBlockLinear(32, 16, tile_size=8).double()
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_memory_formats_of_images_leave_the_tiles_alone(
    trained_layer: Callable[..., CMSBlockLinear], backward: Callable[..., torch.Tensor]
) -> None:
    """`values` has four dimensions as images have; before, the first decision failed."""
    layer = trained_layer()
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for one in (layer, moved):
        assert one.values.is_contiguous()
        torch.manual_seed(1)
        backward(one)
        assert one.values.grad is not None
        assert one.values.grad.is_contiguous()
        one.accumulate_scores()
        assert one.topology_step(global_step=1).num_swaps > 0
    assert torch.equal(layer.values, moved.values)


def test_settings_that_are_no_settings() -> None:
    with pytest.raises(ValueError, match=re.escape("scoring (=dict) must be a ScoringConfig.")):
        CMSBlockLinear(16, 16, scoring={"epsilon": 0.1})  # type: ignore[arg-type]
