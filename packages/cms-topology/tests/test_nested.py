"""Nested tensors: sequences of different lengths without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear


def jagged(lengths: tuple[int, ...], *features: int, requires_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    parts = [torch.randn(length, *features) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=requires_grad)


def test_it_equals_linear_in_output_and_gradients() -> None:
    dense = nn.Linear(32, 48)
    layer = CMSBlockLinear.from_dense(dense, tile_size=8, density=1.0)
    x, same = (jagged((3, 5, 0, 1), 32, requires_grad=True) for _ in range(2))
    y, wanted = layer(x), dense(same)
    for got, want in ((y, wanted), (x, same)):
        if got is x:
            y.values().square().sum().backward()
            wanted.values().square().sum().backward()
            got, want = x.grad, same.grad
        torch.testing.assert_close(got.values(), want.values())
        assert torch.equal(got.offsets(), want.offsets())
    gradient = CMSBlockLinear.from_dense(dense, tile_size=8, density=1.0)
    gradient.values.data = layer.values.grad
    torch.testing.assert_close(gradient.to_dense(), dense.weight.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_residuals_other_layouts_of_lengths_and_compilation() -> None:
    layer = CMSBlockLinear(32, 32, tile_size=8)
    x = jagged((3, 5), 32)
    assert (x + layer(x)).shape[0] == 2
    heads = jagged((3, 5), 2, 32).transpose(1, 2)
    holes = torch.nested.narrow(
        torch.randn(2, 6, 32), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged
    )
    for case in (heads, holes):
        for got, part in zip(layer(case).unbind(), case.unbind(), strict=True):
            torch.testing.assert_close(got, layer(part))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).values(), layer(x).values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_what_is_refused() -> None:
    layer = CMSBlockLinear(32, 32, tile_size=8)
    strided = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(2, 32)])
    with pytest.raises(ValueError, match=r"or nested with layout=torch.jagged: make it so by"):
        layer(strided)
    layer(torch.nested.as_nested_tensor(list(strided.unbind()), layout=torch.jagged))
    ragged = [torch.randn(2, 3), torch.randn(2, 4)]
    with pytest.raises(ValueError, match="lengths in another dimension than its last one"):
        layer(torch.nested.nested_tensor(ragged, layout=torch.jagged))
    with pytest.raises(ValueError, match=r"last dimension of x \(=16\) must be in_features"):
        layer(jagged((3, 5), 16))
