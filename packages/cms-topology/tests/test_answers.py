"""Answers that are rehearsed as whole distributions."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cms_topology import Rehearsal, with_answers
from cms_topology._retention._answers import divergence_from_answers


class Table(nn.Module):
    """Logits [V, V] of the next symbol after a symbol."""

    def __init__(self, symbols: int = 12) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.table = nn.Parameter(torch.randn(symbols, symbols, dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.dropout(self.table)[x]}


def test_they_are_the_most_probable_classes_in_little_space() -> None:
    torch.manual_seed(0)
    model = Table()
    x = torch.randint(12, (7, 5))
    kept = with_answers(model, {"x": x}, classes=3, chunk=2)
    assert model.training
    log_probs = model.table[x].log_softmax(-1).topk(3, dim=-1)
    assert kept["x"] is x
    assert torch.equal(kept["answer_classes"].long(), log_probs.indices)
    assert kept["answer_classes"].dtype == torch.uint8
    assert kept["answer_log_probs"].dtype == torch.float16
    torch.testing.assert_close(
        kept["answer_log_probs"].double(), log_probs.values.detach(), atol=2e-3, rtol=1e-3
    )
    wide = with_answers(Table(300), {"x": x}, classes=400)
    assert wide["answer_classes"].dtype == torch.int16
    assert wide["answer_classes"].shape == (7, 5, 300)


@pytest.mark.parametrize("classes", [4, 12])
def test_the_loss_is_the_divergence_from_then_with_the_rest_as_one_class(classes: int) -> None:
    torch.manual_seed(0)
    model = Table().eval()
    x = torch.randint(12, (7, 5))
    kept = with_answers(model, {"x": x}, classes=classes)
    then = model.table[x].softmax(-1).detach()
    assert abs(float(divergence_from_answers(model, kept).detach())) < 1e-3
    with torch.no_grad():
        model.table.add_(0.3 * torch.randn(12, 12, dtype=torch.float64))
    now = model.table[x].softmax(-1)
    best = then.topk(classes, dim=-1).indices
    p, q = then.gather(-1, best), now.gather(-1, best)
    expected = (p * (p / q).log()).sum(-1)
    if classes < 12:
        p, q = 1 - p.sum(-1), 1 - q.sum(-1)
        expected = expected + p * (p / q).log()
    found = divergence_from_answers(model, kept)
    torch.testing.assert_close(found, expected.mean(), atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(found, model.table)
    (wanted,) = torch.autograd.grad(expected.mean(), model.table)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=0, msg="gradient by table")


def test_rehearsal_takes_the_answers_where_there_are_any_and_brings_them_back() -> None:
    torch.manual_seed(0)
    model = Table().eval()
    x = torch.randint(12, (40, 6))
    kept = with_answers(model, {"x": x})
    then = model.table.softmax(-1).detach()
    assert Rehearsal(model, [{"x": x}]).weight == 0.3
    rehearsal = Rehearsal(model, [kept])
    assert rehearsal.weight == 3.0
    with torch.no_grad():
        model.table.add_(torch.randn(12, 12, dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        rehearsal.loss().backward()
        optimizer.step()
    assert float((model.table.detach().softmax(-1) - then).abs().max()) < 0.02


def test_a_rehearsal_of_answers_goes_on_to_the_bit_from_its_state() -> None:
    torch.manual_seed(0)
    model = Table().eval()
    kept = [with_answers(model, {"x": torch.randint(12, (n, 6))}) for n in (40, 30)]
    with torch.no_grad():
        model.table.add_(torch.randn(12, 12, dtype=torch.float64))
    first = Rehearsal(model, kept)
    first.loss()
    state = safetensors.torch.load(safetensors.torch.save(first.state_dict()))
    second = Rehearsal(model, [{"something": torch.ones(1)}])
    second.load_state_dict(state)
    assert all(torch.equal(first.loss(), second.loss()) for _ in range(3))


@pytest.mark.parametrize("name", ["classes", "chunk"])
def test_a_setting_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(=0\) must be at least 1"):
        with_answers(Table(), {"x": torch.zeros(1, 1, dtype=torch.long)}, **{name: 0})


def test_tasks_of_equal_shape_are_gone_over_in_one_pass_with_the_same_loss() -> None:
    torch.manual_seed(0)
    model = Table().eval()
    kept = [with_answers(model, {"x": torch.randint(12, (7, t))}) for t in (5, 3, 5, 5)]
    with torch.no_grad():
        model.table.add_(0.3 * torch.randn(12, 12, dtype=torch.float64))
    sizes = []
    model.register_forward_hook(
        lambda _, inputs, kwargs, result: sizes.append(len(result["logits"])), with_kwargs=True
    )
    together = Rehearsal(model, kept, rows=6).loss()
    assert sizes == [18, 6]
    separate = Rehearsal(model, kept, rows=6, loss_fn=divergence_from_answers).loss()
    assert sizes == [18, 6, 6, 6, 6, 6]
    torch.testing.assert_close(together, separate)
    gradients = [torch.autograd.grad(loss, model.table)[0] for loss in (together, separate)]
    torch.testing.assert_close(*gradients)
