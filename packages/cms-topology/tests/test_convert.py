"""sparsify and densify."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from cms_topology import CMSBlockLinear, densify, sparse_layers, sparsify


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Sequential(nn.Linear(128, 128)), nn.Linear(128, 64)
    )


def test_sparsify_and_back_at_full_density_keep_the_function() -> None:
    model = mlp()
    x = torch.randn(5, 64)
    before = model(x)
    assert sparsify(model, density=1.0) is model
    assert set(sparse_layers(model)) == {"0", "2.0", "3"}
    torch.testing.assert_close(model(x), before)
    densify(model)
    assert not sparse_layers(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_include_exclude_and_arguments() -> None:
    model = sparsify(mlp(), include=["0", "2.*"], exclude="0", density=0.25, tile_size=32)
    layers = sparse_layers(model)
    assert set(layers) == {"2.0"}
    assert layers["2.0"].density == 0.25
    assert layers["2.0"].B == 32


def test_a_pattern_that_matches_nothing_is_named() -> None:
    """A head that was to stay dense under another name; before, it was replaced without a word."""
    said = re.escape(
        "patterns that match no module's name: ['lm_head']; linear layers of the model"
    )
    with pytest.warns(UserWarning, match=said):
        sparsify(mlp(), exclude=("lm_head", "3"))
    model = nn.ModuleDict({"mlp": mlp(), "norm": nn.LayerNorm(64)})
    sparsify(model, include="mlp.*", exclude=("norm", "mlp.2"))  # nothing to say


def test_names_do_not_depend_on_wrappers() -> None:
    model = sparsify(mlp())
    compiled, parallel = torch.compile(model), nn.DataParallel(model)
    for wrapped in (compiled, parallel, torch.compile(parallel), nn.DataParallel(compiled)):
        assert list(sparse_layers(wrapped)) == list(sparse_layers(model))
    before = list(sparse_layers(model))
    model[2] = checkpoint_wrapper(model[2])
    assert list(sparse_layers(nn.ModuleDict({"_forward_module": model}))) == before  # as Fabric's
    model[0] = torch.compile(model[0])
    assert list(sparse_layers(model)) == before
    bare = CMSBlockLinear(16, 16)
    for wrapped in (bare, torch.compile(bare), nn.DataParallel(bare)):
        assert list(sparse_layers(wrapped)) == ["layer"]


def test_indivisible_layers_stay_dense_with_one_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    with pytest.warns(UserWarning, match=r"left \['1'\] dense: .* tile_size \(=16\)") as caught:
        sparsify(model)
    assert len(caught) == 1
    assert type(model[1]) is nn.Linear


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_and_subclasses_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sparsify(Tied())
        assert list(sparse_layers(model)) == ["hidden"]
        attention = sparsify(nn.TransformerEncoderLayer(32, 2, 64))
        assert sorted(sparse_layers(attention)) == ["linear1", "linear2"]


def test_a_bare_linear() -> None:
    layer = sparsify(nn.Linear(64, 64))
    assert isinstance(layer, CMSBlockLinear)
    assert type(densify(layer)) is nn.Linear


def test_nothing_to_replace() -> None:
    with pytest.raises(ValueError, match=r"include \(='x\*'\).*linear layers of the model: \['0',"):
        sparsify(mlp(), include="x*")
    with pytest.raises(ValueError, match=r"linear layers of the model: none"):
        sparsify(nn.Sequential(nn.ReLU()))
    model = mlp()
    with pytest.raises(ValueError, match=r"row_group \(=3\)"):
        sparsify(model, row_group=3)
    assert not sparse_layers(model), "a refused call changes nothing"
    tied = nn.ModuleDict({"embedding": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match=r"\['head'\] share a parameter with another module"):
        sparsify(tied)


def test_a_layer_used_in_several_places_is_replaced_in_all_of_them() -> None:
    """Before, one place was sparse afterwards and the others went on with the dense weight."""
    shared = nn.Linear(64, 64)
    model = sparsify(nn.Sequential(shared, nn.ReLU(), nn.ModuleList([shared])))
    assert isinstance(model[0], CMSBlockLinear)
    assert model[0] is model[2][0]
    densify(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2][0]
    with pytest.raises(ValueError, match="found nothing to replace"):
        sparsify(model, exclude="2.*")


def test_frozen_parameters_stay_frozen() -> None:
    layer = nn.Linear(64, 64)
    layer.weight.requires_grad_(False)
    sparse = sparsify(layer)
    assert isinstance(sparse, CMSBlockLinear)
    assert sparse.bias is not None
    assert [sparse.values.requires_grad, sparse.bias.requires_grad] == [False, True]
    dense = densify(sparse)
    assert [dense.weight.requires_grad, dense.bias.requires_grad] == [False, True]
    layer.requires_grad_(True).bias.requires_grad_(False)
    sparse = CMSBlockLinear.from_dense(layer)
    assert sparse.bias is not None
    assert [sparse.values.requires_grad, sparse.bias.requires_grad] == [True, False]


def test_what_would_be_lost_stays_dense_and_is_named() -> None:
    """A shared bias quietly; pruned weights and hooks with a warning each."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    model[1].bias = model[0].bias
    prune.l1_unstructured(model[2], "weight", 0.5)
    model[3].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(model)
    assert list(sparse_layers(model)) == ["4"]
    assert model[1].bias is model[0].bias
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    assert said[0].startswith("sparsify left ['2'] dense: something computes their weights")
    assert said[1].startswith("sparsify left ['3'] dense: they have hooks")
    model[4].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"densify dropped the hooks of \['4'\]"):
        densify(model)
    with pytest.raises(ValueError, match=r"Left dense were \['2'\]: something computes"):
        sparsify(model, include="2")


def test_no_layer_hides_behind_another_ones_name() -> None:
    """Before, `fc` took the place of `module.fc`, whose blocks never moved then."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(16, 16)})})
    model["fc"] = nn.Linear(16, 16)
    assert sparse_layers(sparsify(model)) == {"module.fc": model["module"]["fc"], "fc": model["fc"]}
