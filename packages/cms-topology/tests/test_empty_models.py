"""Models made on the "meta" device and filled afterwards, as loaders of large checkpoints do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (CMSBlockLinear(32, 48, tile_size=8, row_group=1) for _ in range(2))
    return nn.Sequential(next(layers), nn.Linear(48, 32), next(layers))


def train(net: nn.Sequential, steps: range) -> Tensor:
    """The last output; statistics of absent blocks are collected and not folded yet at the end."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    manager = TopologyManager(net, optimizer, periods=(1, 4, 4), sample_steps=4)
    y = torch.empty(0)
    for i in steps:
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(i))
        y = net(x)
        y.square().mean().backward()
        optimizer.step()
        manager.step()
        optimizer.zero_grad()
    return y


def assign_whole(empty: nn.Module, state: dict[str, Tensor]) -> None:
    empty.load_state_dict(state, assign=True)


def assign_one_by_one(empty: nn.Module, state: dict[str, Tensor]) -> None:
    for name in sorted(state):  # the scorer's own statistics before its buffers
        owner, _, leaf = name.rpartition(".")
        module = empty.get_submodule(owner)
        if leaf == "_extra_state":
            assert isinstance(module, type(empty[0].scorer))  # type: ignore[index]
            module.set_extra_state(state[name])
        elif leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(state[name])
        else:
            module._buffers[leaf] = state[name]


@pytest.mark.parametrize("fill", [assign_whole, assign_one_by_one])
def test_an_empty_model_goes_on_where_the_filled_one_stood(fill) -> None:  # type: ignore[no-untyped-def]
    source = model()
    train(source, range(6))
    with torch.device("meta"):
        empty = model(1)
    assert empty.state_dict()["0.scorer._extra_state"].is_meta
    state = {name: t.clone() for name, t in source.state_dict().items()}
    fill(empty, state)
    x = torch.randn(3, 32)
    assert torch.equal(empty(x), source(x))
    for name, t in source.state_dict().items():
        assert torch.equal(empty.state_dict()[name], t), name
    assert torch.equal(train(empty, range(6, 14)), train(source, range(6, 14)))
    for name, t in source.state_dict().items():
        assert torch.equal(empty.state_dict()[name], t), name


def test_statistics_that_nobody_filled_start_at_zero() -> None:
    source = CMSBlockLinear(32, 48, tile_size=8)
    with torch.device("meta"):
        empty = CMSBlockLinear(32, 48, tile_size=8)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("_extra_state")}
    empty.load_state_dict(state, strict=False, assign=True)
    empty(torch.randn(3, 32)).sum().backward()
    empty.accumulate_scores()
    assert not empty.topology_step().swapped.any()
    assert torch.equal(empty.state_dict()["col_indices"], source.col_indices)


def test_an_empty_layer_that_nobody_filled_says_what_to_do() -> None:
    layer = nn.utils.skip_init(CMSBlockLinear, 32, 48, tile_size=8)
    layer.col_indices.fill_(7)  # what was in that memory
    with pytest.raises(ValueError, match=r"\(=7\) must be in .* or call reset_parameters\(\)"):
        layer(torch.randn(3, 32))
    layer.reset_parameters()
    layer(torch.randn(3, 32))


def test_another_tensor_of_indices_is_noticed() -> None:
    """Whatever its version is; before, the index of the old columns was used on with it."""
    layer = CMSBlockLinear(32, 48, tile_size=8, row_group=1, backend="reference")
    other = layer.col_indices.flip(1).roll(1, 0)
    while other._version < layer.col_indices._version:
        other.add_(0)
    layer._buffers["col_indices"] = other
    layer(torch.randn(3, 32))
    slots = layer._index.order[: int(layer._index.col_start[1])]
    assert (other.flatten()[slots.long()] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_file_that_was_cast_as_a_whole(dtype: torch.dtype) -> None:
    """As exports to half are; before, the first step on what was assigned failed."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t.long()

    torch.manual_seed(0)
    source, target = CMSBlockLinear(32, 48, tile_size=8), CMSBlockLinear(32, 48, tile_size=8)
    state = {name: cast(t) for name, t in source.state_dict().items()}
    target.load_state_dict(state, assign=True)
    assert target.values.dtype == dtype
    for name, buffer in target.named_buffers():
        assert buffer.dtype == source.get_buffer(name).dtype, name
    target.collect_candidates = True
    for _ in range(2):
        target(torch.randn(5, 32, dtype=dtype)).square().sum().backward()
        target.accumulate_scores()
    target.topology_step(global_step=1)
    assert (target.block_scores() > 0).all()


@pytest.mark.parametrize("moved", [None, lambda net: net.double().float(), copy.deepcopy])
def test_a_layer_can_be_traced_while_it_trains(moved: Callable[..., nn.Module] | None) -> None:
    net, x = CMSBlockLinear(32, 48, tile_size=8), torch.randn(3, 32)
    net.collect_candidates = True
    if moved is not None:  # its columns are looked up again, and that is no part of a trace
        net = moved(net)
    with pytest.warns(Warning, match="trac|jit"):
        traced = torch.jit.trace(net, x)
    for inputs in (x, torch.randn(5, 32)):
        assert torch.equal(traced(inputs), net(inputs))


def test_statistics_of_another_kind_of_score_are_refused() -> None:
    scoring = ScoringConfig(candidate_score="loss", keep_score="loss")
    layer = CMSBlockLinear(32, 48, tile_size=8, scoring=scoring)
    said = re.escape("layer with R=6, C=4, candidate_score='loss'; the checkpoint belongs to")
    with pytest.raises(ValueError, match=said):
        layer.load_state_dict(CMSBlockLinear(32, 48, tile_size=8).state_dict())


def test_an_ensemble_maps_over_models_of_other_topologies() -> None:
    """As torch's tutorial does it: stacked states of an empty base, in one call."""
    models = [model(seed) for seed in range(3)]
    states = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(5, 32)

    def output(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(base, (parameters, buffers), (x,))
        return y

    y = torch.vmap(output)(*states)
    for i, one in enumerate(models):
        torch.testing.assert_close(y[i], one(x))


@pytest.mark.parametrize("candidate_score", ["gradient", "loss"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_matters_to_parameters_only(
    default: torch.dtype, candidate_score: str
) -> None:
    """Loaders build models under another one; before, scores were kept in it or refused."""
    scoring = ScoringConfig(
        candidate_score=candidate_score,  # type: ignore[arg-type]
        keep_score="loss" if candidate_score == "loss" else "gradient",
        min_swap_frac=0.05,
    )

    def trained() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        layer = CMSBlockLinear(
            64, 64, tile_size=8, scoring=scoring, dtype=torch.float32, generator=generator
        )
        optimizer = torch.optim.AdamW(layer.parameters())
        manager = TopologyManager(layer, optimizer, periods=(1, 2, 4))
        for _ in range(9):
            x = torch.randn(16, 64, generator=generator, dtype=torch.float32)
            layer(x).square().mean().backward()
            optimizer.step()
            manager.step()
            optimizer.zero_grad()
        assert manager.swap_rate
        return layer.state_dict()

    want, before = trained(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = trained()
    finally:
        torch.set_default_dtype(before)
    for name, t in want.items():
        assert torch.equal(got[name], t), name
