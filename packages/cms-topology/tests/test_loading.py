"""States of layers that differ, and states that are not whole: a message, or the right thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cms_topology import CMSBlockLinear, TopologyManager, densify, sparsify


def make(seed: int = 0, **kwargs: object) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return sparsify(model, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            {"density": 0.5},
            {"density": 0.25},
            "0.values of the checkpoint (shape [8, 2, 16, 16]) must be [R, K, tile, tile] = "
            "[8, 1, 16, 16]: build the layer with tile_size=16 and max_density=0.5, or make it",
        ),
        ({"tile_size": 8}, {"tile_size": 16}, "tile_size=8 and max_density=0.5"),
        (
            {"row_group": 1},
            {"row_group": 4},
            "Build the layer with the row_group that the checkpoint's had; row_group=1 takes any.",
        ),
    ],
)
def test_another_layer_is_refused_before_anything_is_changed(
    saved: dict[str, object], loaded: dict[str, object], message: str
) -> None:
    source, target = make(1, **saved), make(2, **loaded)
    if "row_group" in saved:
        source[0].reset_parameters()  # rows of norms alone might agree
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        target.load_state_dict(source.state_dict())
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_another_size_is_refused() -> None:
    source, target = CMSBlockLinear(64, 64), CMSBlockLinear(64, 128)
    with pytest.raises(ValueError, match="it is not of a layer of this size"):
        target.load_state_dict(source.state_dict())


def test_a_checkpoint_gets_room_to_grow_by_way_of_a_dense_model() -> None:
    """As the message of a refused checkpoint says."""
    source, x = make(1, density=0.25), torch.randn(3, 64)
    y = source(x)
    roomy = sparsify(densify(source), density=0.25, max_density=0.5)
    torch.testing.assert_close(roomy(x), y)
    assert roomy[0].grow(0.5) == 1


def test_a_slot_layout_of_rows_goes_into_free_rows() -> None:
    source, target = make(1, row_group=4), make(2, row_group=1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 64)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("given", ["values", "col_indices"])
def test_half_a_weight_is_noticed(given: str) -> None:
    """Parameters without buffers, as some save them: tiles would stand in other columns."""
    source, target = make(1), make(2)
    state = {n: t for n, t in source.state_dict().items() if n.endswith(("bias", given))}
    with pytest.warns(UserWarning, match="tiles mean nothing without their columns") as said:
        target.load_state_dict(state, strict=False)
    missing = "col_indices" if given == "values" else "values"
    for warning, name in zip(said, ("0", "2"), strict=True):
        assert f"{name}.{given} is loaded without {name}.{missing}" in str(warning.message)
    target.load_state_dict({"0.bias": source[0].bias}, strict=False)  # nothing to say


def test_a_dense_checkpoint_is_noticed() -> None:
    """With strict=False torch only returns the names; nobody looks at them."""
    target, dense = CMSBlockLinear(64, 64), nn.Linear(64, 64)
    message = "weight is of a dense layer and is not loaded; load it into the dense model"
    with pytest.warns(UserWarning, match=message):
        target.load_state_dict(dense.state_dict(), strict=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    """torch.distributed.checkpoint loads in place, into what `state_dict` returned."""

    def trained(model: nn.Sequential, manager: TopologyManager, steps: range) -> None:
        (optimizer,) = manager._optimizers
        for step in steps:
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            model(x * torch.linspace(0.1, 2, 64)).square().mean().backward()
            optimizer.step()
            manager.step()
            optimizer.zero_grad()

    def setup(seed: int) -> tuple[nn.Sequential, TopologyManager]:
        model = make(seed, row_group=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, TopologyManager(model, optimizer, periods=(1, 2, 4), sample_steps=3)

    model, manager = setup(1)
    trained(model, manager, range(6))
    state = {"model": model.state_dict(), "manager": manager.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path)
    again, other = setup(2)
    state = {"model": again.state_dict(), "manager": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["manager"])
    assert other.global_step == 6
    for (name, tensor), found in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), name
    x = torch.randn(3, 64)
    assert torch.equal(model(x), again(x))
