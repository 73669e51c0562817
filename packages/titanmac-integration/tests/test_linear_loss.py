"""The loss without logits is the loss with logits, gradients included."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._layers._linear_loss import linear_loss, softmax_gradient_
from titanmac_integration._layers._losses import language_model_loss

Make = Callable[..., TitanMACConfig]
V, D = 37, 16


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (3, 11), generator=generator)
    labels[0, 4:] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_it_is_the_loss_of_the_logits(rows: int, z_weight: float) -> None:
    hidden, weight, labels = inputs(torch.float64)
    results = []
    for chunked in (False, True):
        hidden.grad = weight.grad = None
        if chunked:
            output = linear_loss(hidden, weight, labels, z_weight, chunk_bytes=rows * V * 8)
        else:
            # in double precision, so not by language_model_loss, which is single
            logits = (hidden @ weight.t())[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()
            cross_entropy = functional.cross_entropy(logits, targets, ignore_index=-100)
            z_loss = logits.logsumexp(-1).square()[targets != -100].mean()
            output = {"loss": cross_entropy + z_weight * z_loss, "cross_entropy": cross_entropy}
            output |= {"z_loss": z_loss} if z_weight else {}
        (3.0 * output["loss"]).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results.append([hidden.grad, weight.grad, *(output[k].detach() for k in sorted(output))])
    assert len(results[0]) == len(results[1])
    for plain, chunked_result in zip(*results, strict=True):
        torch.testing.assert_close(chunked_result, plain)


def test_under_autocast_it_errs_no_more_than_the_plain_way() -> None:
    hidden, weight, labels = inputs(torch.float32)
    exact = {}
    errors: dict[str, dict[str, float]] = {}
    for way in ("exact", "plain", "chunked"):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "chunked":
                output = linear_loss(hidden, weight, labels, 1e-3, chunk_bytes=8 * V * 2)
            else:
                output = language_model_loss(functional.linear(hidden, weight), labels, 1e-3)
        output["loss"].backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        found = {"hidden": hidden.grad, "weight": weight.grad, "loss": output["loss"].detach()}
        exact = exact or found
        errors[way] = {k: float((v - exact[k]).norm() / exact[k].norm()) for k, v in found.items()}
    assert errors["plain"]["weight"] > 1e-4  # or nothing was rounded, and nothing is compared
    for name, error in errors["plain"].items():
        assert errors["chunked"][name] < 1.5 * error + 1e-4, name


def test_without_gradients_nothing_is_gathered() -> None:
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        quiet = linear_loss(hidden, weight, labels, 0.0)["loss"]
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, linear_loss(hidden, weight, labels, 0.0)["loss"].detach())


def test_nothing_that_counts_is_not_a_number() -> None:
    hidden, weight, labels = inputs(torch.float32)
    assert linear_loss(hidden, weight, torch.full_like(labels, -100), 0.0)["loss"].isnan()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, labels = inputs(torch.float32)
    labels[1, 3] = -7
    with pytest.raises((IndexError, RuntimeError)):
        linear_loss(hidden, weight, labels, 0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_trains_alike_without_logits(tiny_config: Make, tied: bool) -> None:
    config = tiny_config(tie_weights=tied, z_loss_weight=0.01)
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    gradients = []
    for return_logits in (True, False):
        model = create_titanmac_model(config)
        output = model(tokens, tokens, return_logits=return_logits)
        assert ("logits" in output) == return_logits
        output["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_hooks_of_the_head_are_called(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config(tie_weights=False))
    tokens = torch.randint(256, (1, 9))
    plain = model(tokens, tokens, return_logits=False)["loss"]
    seen = []
    assert model.head is not None
    model.head.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(model(tokens, tokens, return_logits=False)["loss"], plain)
    assert seen == [True]


def test_neither_logits_nor_loss_is_an_error(tiny_config: Make) -> None:
    model = create_titanmac_model(tiny_config())
    with pytest.raises(ValueError, match=r"return_logits \(=False\) must be True without labels"):
        model(torch.zeros(1, 3, dtype=torch.long), return_logits=False)


CHECK = """
import sys, torch
from titanmac_integration._layers import _linear_loss, _loss_kernels
_loss_kernels.BLOCK = 16
device = sys.argv[1]
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    for z in (0.0, 0.1):
        x = (3 * torch.randn(5, 45)).to(device, dtype)[:, :37]
        targets = torch.tensor([0, 36, -100, 16, 5], device=device)
        expected = x.clone()
        sums = _linear_loss.softmax_gradient_(expected, targets, z, True)
        only = _loss_kernels.softmax_gradient_(x, targets, z, False)
        before = x.clone()
        got = _loss_kernels.softmax_gradient_(x, targets, z, True)
        assert not torch.equal(before, x)
        torch.testing.assert_close(only, sums)
        torch.testing.assert_close(got, sums)
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)
        assert x[2].eq(0).all()
print("agrees")
"""


def test_the_kernel_agrees_with_torch(assert_agrees: Callable[[str], None]) -> None:
    """In Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)


def test_the_gradient_of_a_row_takes_the_place_of_its_logits() -> None:
    logits = torch.randn(4, V, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, V - 1])
    row = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    (expected,) = torch.autograd.grad(row, logits)
    taken = logits.detach().clone()
    softmax_gradient_(taken, targets, 0.0, True)
    torch.testing.assert_close(taken, expected)
