"""Mistakes that would otherwise show late, or never."""

import warnings

import pytest
import torch
from torch import nn

from cms_topology import CMSBlockLinear, RetentionGuard, TopologyManager, consolidate, sparsify


def small_model(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), norm if norm is not None else nn.Identity(), nn.Linear(64, 32)]
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


def test_input_of_another_width_is_refused_by_the_layers_own_size() -> None:
    layer = CMSBlockLinear(64, 32, density=0.5)
    with pytest.raises(
        ValueError, match=r"last dimension of x \(=80\) must be in_features \(=64\)"
    ):
        layer(torch.randn(3, 80))


def test_optimizer_made_before_sparsify_is_refused() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparse = sparsify(model, density=0.5)
    with pytest.raises(ValueError, match="made after sparsify"):
        TopologyManager(sparse, optimizer)
    TopologyManager(sparse, None)
    TopologyManager(sparse, torch.optim.SGD(sparse.parameters(), 0.1))


def test_guard_refuses_the_optimizer_of_another_model() -> None:
    model = small_model()
    memory = consolidate(model, [torch.randn(8, 32)], loss_fn=loss_of)
    other = torch.optim.SGD(small_model().parameters(), 0.1)
    with pytest.raises(ValueError, match="holds none of them"):
        RetentionGuard(model, other, memory)


@pytest.mark.parametrize("usage", ["loss", "none"])
def test_consolidation_of_data_that_are_not_finite_is_refused(usage: str) -> None:
    batches = [torch.randn(8, 32), torch.full((8, 32), float("nan"))]
    with pytest.raises(ValueError, match=r"'sums' must give finite.*2 of 2.*first '0\.weight'"):
        consolidate(small_model(), batches, "sums", loss_fn=loss_of, usage=usage)


def test_errors_and_reprs_do_not_print_tensors() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"batches \(=1 seen\) of task 'task' reached no"):
        consolidate(model, [torch.randn(8, 32)], loss_fn=lambda model, x: x.mean())
    memory = consolidate(model, [torch.randn(8, 32)], "sums", loss_fn=loss_of)
    assert repr(memory).startswith("Consolidation(tasks=['sums'], 2 weight matrices, 0 embeddings")
    assert len(repr(memory)) < 120


def guarded_step(model: nn.Module) -> None:
    memory = consolidate(model, [torch.randn(8, 32)], loss_fn=loss_of)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard = RetentionGuard(model, optimizer, memory)
    for _ in range(2):
        loss_of(model, torch.randn(8, 32)).backward()
        optimizer.step()
    guard.remove()


def test_running_statistics_in_training_mode_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=r"1 norm layers \(first '1'\)") as caught:
        guarded_step(small_model(nn.BatchNorm1d(64)))
    assert len(caught) == 1
    still = small_model(nn.BatchNorm1d(64))
    still[1].eval()  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded_step(still)
        guarded_step(small_model(nn.LayerNorm(64)))


@pytest.mark.parametrize("grad", [False, True])
def test_torchs_transformer_layer_works_in_evaluation_mode(grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder = sparsify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), density=0.5)
    assert isinstance(encoder.layers[0].linear1, CMSBlockLinear)
    x = torch.randn(2, 5, 32)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    want = encoder(x)
    encoder.eval()
    with torch.set_grad_enabled(grad):
        assert torch.allclose(encoder(x), want, atol=1e-5)


def test_replicas_of_data_parallel_are_for_evaluation_only() -> None:
    layer, x = CMSBlockLinear(32, 64, density=0.5), torch.randn(3, 32)
    replica = layer._replicate_for_data_parallel()  # as torch makes them, one per device
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.clone())
    replica.col_indices = layer.col_indices.clone()
    with torch.no_grad():
        assert torch.equal(replica(x), layer(x))
    replica.col_indices = layer.col_indices.clone()
    with pytest.raises(ValueError, match=r"under nn.DataParallel.*: use DistributedDataParallel"):
        replica(x)
