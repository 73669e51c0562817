"""Rehearsal: the loss it adds, and what it does together with damped updates."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import Rehearsal, RetentionGuard, consolidate

SYMBOLS = 12


class Pairs(nn.Module):
    """Answers two symbols with one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, SYMBOLS)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.fc2(functional.gelu(self.fc1(self.embedding(x).flatten(1))))
        return {"logits": logits, "loss": functional.cross_entropy(logits, labels)}


def task(first: int) -> dict[str, Tensor]:
    """All pairs that begin with one of six symbols; both tasks share the second ones."""
    x = torch.cartesian_prod(torch.arange(first, first + 6), torch.arange(SYMBOLS))
    return {"x": x, "labels": (x[:, 0] * 5 + x[:, 1] * 3) % SYMBOLS}


OLD, NEW = task(0), task(6)


def learned() -> Pairs:
    torch.manual_seed(0)
    model = Pairs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(**OLD)["loss"].backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, task: dict[str, Tensor]) -> float:
    right = model(**task)["logits"].argmax(-1) == task["labels"]
    return float(right.float().mean())


def test_the_loss_is_the_weighted_one_on_drawn_sequences_of_every_task() -> None:
    model = learned()
    rehearsal = Rehearsal(
        model, [OLD, NEW], weight=0.5, rows=7, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):  # drawn anew each time
        expected = torch.zeros(())
        for kept in (OLD, NEW):
            chosen = torch.randint(len(kept["x"]), (7,), generator=generator)
            expected += 0.5 * model(kept["x"][chosen], kept["labels"][chosen])["loss"]
        torch.testing.assert_close(rehearsal.loss(), expected)
    assert rehearsal.num_bytes == 2 * 72 * 3 * 8
    own = Rehearsal(model, [OLD], weight=2.0, loss_fn=lambda m, b: b["x"].float().mean() * 0 + 1)
    assert float(own.loss()) == 2.0


def test_it_goes_on_to_the_bit_from_its_state() -> None:
    model = learned()
    first = Rehearsal(model, [OLD, NEW])
    first.loss()
    state = safetensors.torch.load(safetensors.torch.save(first.state_dict()))
    expected = [first.loss() for _ in range(3)]
    second = Rehearsal(model, [{"something": torch.ones(1)}])
    second.load_state_dict(state)
    assert [set(batch) for batch in second.kept] == [{"x", "labels"}] * 2
    assert all(torch.equal(second.loss(), loss) for loss in expected)
    with pytest.raises(ValueError, match=r"state \(of \['generator'\]\) must hold a generator and"):
        second.load_state_dict({"generator": state["generator"]})


def test_damping_and_rehearsal_hold_the_old_task_from_the_first_step_to_the_last() -> None:
    results = {}
    for damped in (True, False):
        model = learned()
        memory = consolidate(model, [OLD])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if damped:
            RetentionGuard(model, optimizer, memory, drift=None)
        rehearsal = Rehearsal(model, [OLD])
        lowest = accuracy(model, OLD)
        assert lowest == 1.0
        for _ in range(400):
            optimizer.zero_grad()
            (model(**NEW)["loss"] + rehearsal.loss()).backward()
            optimizer.step()
            lowest = min(lowest, accuracy(model, OLD))
        results[damped] = (lowest, accuracy(model, NEW))
    assert results[True][0] > 0.95
    assert results[True][1] > 0.9
    assert results[False][0] < results[True][0], "rehearsal alone dips"


@pytest.mark.parametrize(
    ("kept", "options", "message"),
    [
        ([], {}, r"kept \(=\[\]\) must hold at least one task"),
        ([{"x": torch.zeros(0, 2)}], {}, r"kept\[0\] \(of \[0\] sequences\)"),
        ([OLD, {"x": torch.zeros(2), "y": torch.zeros(3)}], {}, r"kept\[1\] \(of \[2, 3\]"),
        ([OLD], {"weight": -1.0}, r"weight \(=-1.0\) must be 0 or more"),
        ([OLD], {"rows": 0}, r"rows \(=0\) must be at least 1"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    kept: list[dict[str, Tensor]], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rehearsal(Pairs(), kept, **options)  # type: ignore[arg-type]
