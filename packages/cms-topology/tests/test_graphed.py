"""What GraphedBackward does around its graphs; the graphs themselves need a GPU: test_graphed_gpu.

Here a capture is stood in for by a function that computes the same anew, into the same tensors and
from the same tensors, which is all that the rest can see of a graph.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import CMSBlockLinear, GraphedBackward, ScoringConfig, TopologyManager, _graphed

SAMPLES = 6


def make_model(candidate_score: str = "gradient") -> nn.Module:
    torch.manual_seed(0)
    keep = {"keep_score": "loss"} if candidate_score == "loss" else {}
    loose = {"max_swap_frac": 0.5, "max_row_swap_frac": 0.5, "swap_threshold": 1.0}
    scoring = ScoringConfig(candidate_score=candidate_score, **keep, **loose)
    options = {"tile_size": 8, "row_group": 1, "scoring": scoring}
    return nn.Sequential(
        CMSBlockLinear(16, 32, **options), nn.Tanh(), CMSBlockLinear(32, 16, **options)
    )


def batch(step: int, rows: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 16, generator=generator)
    return x, x.roll(1, dims=1)


def gradients_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def gradients(x: Tensor, y: Tensor) -> Tensor:
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return gradients


def plain_steps_only(model: nn.Module) -> nn.Module:
    """The model, with no statistics of absent blocks to collect."""
    for layer in (model[0], model[2]):
        layer.collect_candidates = False
    return model


def call(backward: GraphedBackward, model: nn.Module, steps: range, rows: int = SAMPLES) -> Tensor:
    """The last loss."""
    for step in steps:
        model.zero_grad()
        loss = backward(*batch(step, rows))
    return loss


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of captures and replays, on a CPU."""
    counts = {"beside": 0, "captured": 0, "replayed": 0}
    models: list[nn.Module] = []

    def beside(work: Callable[[], Tensor]) -> Tensor:
        counts["beside"] += 1
        return work()

    def capture(work: Callable[[], Tensor], generators: Any, pool: Any) -> Any:
        counts["captured"] += 1
        result = work()
        leaves = [p for m in models for p in leaves_of(m)]
        kept = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]

        def replay() -> None:
            counts["replayed"] += 1
            for leaf in leaves:
                leaf.grad = None
            result.copy_(work())
            for leaf, gradient in kept:
                gradient.copy_(leaf.grad)
                leaf.grad = None

        return replay, result, "pool"

    monkeypatch.setattr(_graphed, "capturable", lambda device: True)
    monkeypatch.setattr(_graphed, "beside", beside)
    monkeypatch.setattr(_graphed, "capture", capture)
    original = GraphedBackward.__init__

    def remember(self: GraphedBackward, function: Any, model: nn.Module, **options: Any) -> None:
        models.append(model)
        original(self, function, model, **options)

    monkeypatch.setattr(GraphedBackward, "__init__", remember)
    return counts


def leaves_of(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, CMSBlockLinear)]
    probes = [p for x in layers for p in (x._probe, x._fisher_probe) if p is not None]
    return [*model.parameters(), *probes]


def train(model: nn.Module, steps: int, graphed: bool) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    manager = TopologyManager(model, optimizer, periods=(1, 2, 4))
    plain = gradients_of(model)
    backward = GraphedBackward(plain, model) if graphed else plain
    losses, swaps = [], []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(backward(*batch(step)).item())
        optimizer.step()
        report = manager.step()
        if report.swap_rate is not None:
            swaps.append(report.swap_rate)
    return losses, swaps


@pytest.mark.parametrize("candidate_score", ["outer", "gradient", "loss"])
def test_training_is_the_same_to_the_bit(captures: dict[str, int], candidate_score: str) -> None:
    plain, graphed = make_model(candidate_score), make_model(candidate_score)
    expected = train(plain, 30, graphed=False)
    assert train(graphed, 30, graphed=True) == expected
    assert sum(expected[1]) > 0, "blocks must move for this to say anything"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, graphed.state_dict()[name]), name
    # "loss" collects in all steps of so short a period
    assert captures["captured"] == {"outer": 2, "gradient": 2, "loss": 0}[candidate_score]
    if candidate_score != "loss":
        # three, and one of the other kind of step if that was not among them
        assert captures["beside"] == {"outer": 3, "gradient": 4}[candidate_score]
        assert captures["replayed"] == 30 - captures["beside"]


def test_every_call_is_a_real_one(captures: dict[str, int]) -> None:
    model = plain_steps_only(make_model())
    backward = GraphedBackward(gradients_of(model), model)
    for step in range(6):
        model.zero_grad()
        loss = backward(*batch(step))
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = gradients_of(model)(*batch(step))
        assert loss.item() == expected.item()
        assert not loss.requires_grad
        for mine, p in zip(got, model.parameters(), strict=True):
            assert torch.equal(mine, p.grad)
    assert captures == {"beside": 3, "captured": 1, "replayed": 3}
    assert backward.num_graphs == 1


def test_losses_of_earlier_steps_stay(captures: dict[str, int]) -> None:
    model = make_model()
    backward = GraphedBackward(gradients_of(model), model)
    losses = []
    for step in range(8):
        model.zero_grad()
        model[0]._probe.grad = model[2]._probe.grad = None
        losses.append((backward(*batch(step)), step))
    assert captures["replayed"] == 5
    for loss, step in losses:
        assert loss.item() == functional.mse_loss(model(batch(step)[0]), batch(step)[1]).item()


def test_gradients_that_are_there_are_added_to(captures: dict[str, int]) -> None:
    model = plain_steps_only(make_model())
    backward = GraphedBackward(gradients_of(model), model)
    call(backward, model, range(4))
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"gradients of an earlier call are there, .*set_to_none"):
        backward(*batch(9))
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(*batch(9))
    for first, both, p in zip(before, together, model.parameters(), strict=True):
        torch.testing.assert_close(both, first + p.grad)
    assert captures["replayed"] == 2


def test_other_shapes_modes_and_growth_get_graphs_of_their_own(captures: dict[str, int]) -> None:
    model = plain_steps_only(make_model())
    backward = GraphedBackward(gradients_of(model), model, max_graphs=2)

    def calls(times: int, rows: int = SAMPLES) -> None:
        call(backward, model, range(times), rows)

    calls(5)
    calls(5, rows=3)
    assert backward.num_graphs == 2
    model.eval()
    with pytest.warns(UserWarning, match=r"inputs of 2 shapes \(=max_graphs\) .* \(6, 16\)"):
        calls(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(2)
    model.train()
    model[0].values.data = model[0].values.data.clone()  # other memory
    calls(1)
    assert backward.num_graphs == 0
    calls(3)
    assert backward.num_graphs == 1
    backward.forget()
    assert backward.num_graphs == 0


def test_indices_written_to_from_outside_are_noticed(captures: dict[str, int]) -> None:
    model, other = make_model(), make_model()
    other[0].col_indices.copy_((other[0].col_indices + 1) % other[0].C)
    plain_steps_only(model)
    backward = GraphedBackward(gradients_of(model), model)
    call(backward, model, range(5))
    with torch.no_grad():
        model[0].col_indices.copy_(other[0].col_indices.sort(dim=1).values)
    loss = call(backward, model, range(1, 2))
    assert captures["replayed"] == 2, "this call is not a replay"
    assert loss.item() == functional.mse_loss(model(batch(1)[0]), batch(1)[1]).item()


def test_on_a_cpu_it_says_so_once_and_computes() -> None:
    model = make_model()
    backward = GraphedBackward(gradients_of(model), model)
    with pytest.warns(UserWarning, match=r"model \(on cpu\) must be on a CUDA device"):
        loss = backward(*batch(0))
    assert loss.item() == functional.mse_loss(model(batch(0)[0]), batch(0)[1]).item()
    assert model[0].values.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(*batch(1))


def test_bad_arguments(captures: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"max_graphs \(=0\) must be at least 1"):
        GraphedBackward(gradients_of(make_model()), make_model(), max_graphs=0)
    model = make_model()

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(_graphed, "capture", refuse)
    plain_steps_only(model)
    backward = GraphedBackward(gradients_of(model), model)
    call(backward, model, range(3))
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"function could not be captured .*item\(\)"):
        backward(*batch(3))
