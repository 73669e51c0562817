"""Parameters that no old task used train freely; those used in ways that are not seen stay."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from cms_topology import Consolidation, RetentionGuard, consolidate


class Doubling(torch.autograd.Function):
    """An operation of somebody's own, which no function mode is shown."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradients[0] * scale, (gradients[0] * x).sum(0)


class Heads(nn.Module):
    """A body and a head per task; `scale` and `shift` are used as linear layers are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(16, 32)
        self.scale = nn.Parameter(torch.ones(32))
        self.shift = nn.Parameter(torch.zeros(1, 32))
        self.heads = nn.ModuleDict({"a": nn.Linear(32, 4), "b": nn.Linear(32, 4)})

    def forward(self, x: Tensor, head: str) -> Tensor:
        h = Doubling.apply(self.body(x).relu(), self.scale)
        with torch.no_grad():
            shift = self.shift[0]  # no gradient, but the answers depend on it
        result: Tensor = self.heads[head](h + shift)
        return result


def loss_of(model: nn.Module, batch: tuple[Tensor, str]) -> Tensor:
    x, head = batch
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return nn.functional.cross_entropy(model(x, head), labels)


def data(head: str, seed: int = 1) -> list[tuple[Tensor, str]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 16, generator=generator), head) for _ in range(4)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, head: str, steps: int) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data(head, 2)[step % 4])
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_new_head_learns_and_the_old_one_answers_as_before() -> None:
    model = Heads()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, "a", 100)
    memory = consolidate(model, data("a"), "a", loss_fn=loss_of)
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.0)
    assert guard.free == ["heads.b.weight", "heads.b.bias"]
    assert guard.still == ["scale", "shift", "body.bias", "heads.a.bias"]
    before = [model(x, "a").detach() for x, _ in data("a")]
    first = float(loss_of(model, data("b", 2)[0]).detach())
    assert train(model, optimizer, "b", 300) < 0.5 * first
    for (x, _), answer in zip(data("a"), before, strict=True):
        torch.testing.assert_close(model(x, "a"), answer, atol=1e-3, rtol=1e-3)


def test_a_head_added_later_is_free_until_its_task_is_consolidated() -> None:
    model = Heads()
    memory = consolidate(model, data("a"), "a", loss_fn=loss_of)
    model.heads["c"] = nn.Linear(32, 4)
    guard = RetentionGuard(model, None, memory)
    assert [n for n in guard.free if "heads.c" in n] == ["heads.c.weight", "heads.c.bias"]
    both = consolidate(model, data("c"), "c", loss_fn=loss_of, previous=memory)
    guard = RetentionGuard(model, None, both)
    assert guard.free == ["heads.b.weight", "heads.b.bias"]
    assert "heads.c.bias" in guard.still


@pytest.mark.parametrize("controls", [{"drift": 1e-3}, {"drift": None, "eps": 0.01}])
def test_frozen_weights_cost_nothing_until_they_are_trained(controls: dict[str, Any]) -> None:
    """As the base beside adapters; unfrozen later, they are held as if they always had been."""
    memory = consolidate(Heads(), data("a"), "a", loss_fn=loss_of)
    models, guards, sizes = [], [], []
    for frozen in (False, True):
        model = Heads()
        model.body.weight.requires_grad_(not frozen)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        guard = RetentionGuard(model, optimizer, memory, **controls)
        assert ("body.weight" in guard.drift()) == (not frozen)
        sizes.append(guard.num_bytes)
        if not frozen:
            model.body.weight.requires_grad_(False)
        train(model, optimizer, "b", 2)
        model.body.weight.requires_grad_(True)
        train(model, optimizer, "b", 3)
        models.append(model)
        guards.append(guard)
    assert sizes[0] - sizes[1] >= 4 * 32 * 16
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert guards[1].drift() == pytest.approx(guards[0].drift(), rel=1e-3)
    assert guards[1].drift()["body.weight"] > 0
    assert guards[1].state_dict()["weights"].keys() == guards[0].state_dict()["weights"].keys()


def test_without_a_graph_nothing_is_known_to_be_unused() -> None:
    model = Heads()
    memory = consolidate(model, data("a"), "a", loss_fn=loss_of, usage="none")
    assert memory.touched is None
    assert RetentionGuard(model, None, memory, drift=None).free == []
    known = consolidate(model, data("b"), "b", loss_fn=loss_of)
    assert memory.plus(known).touched is None


def test_what_was_touched_survives_a_file() -> None:
    memory = consolidate(Heads(), data("a"), "a", loss_fn=loss_of)
    assert memory.touched == ["body.bias", "body.weight", "heads.a.bias", "heads.a.weight", "scale",
                              "shift"]  # fmt: skip
    assert Consolidation.from_tensors(load(save(memory.to_tensors()))).touched == memory.touched


def test_weights_that_cannot_be_guarded_are_named_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"both": nn.Bilinear(8, 8, 4), "head": nn.Linear(4, 4)})

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model["head"](model["both"](x, x)).square().mean()  # type: ignore[index]
        return result

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    memory = consolidate(model, [torch.randn(4, 8)], loss_fn=loss)
    guard = RetentionGuard(model, optimizer, memory)
    assert "both.weight" in guard.still
    loss(model, torch.randn(4, 8)).backward()
    told = r"stay as they are: 1 used by bilinear \(first 'both\.weight'\)\. The inputs of the old"
    with pytest.warns(UserWarning, match=told):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


class Sliced(nn.Module):
    """A matrix that is multiplied whole or, with inputs of their own, in slices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] == 1:
            return nn.functional.linear(x, self.qkv)
        q, kv = self.qkv.split([2, 4])
        return torch.cat([nn.functional.linear(y, w) for y, w in ((x, q), (3 * x, kv))], 1)


def sliced_loss(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x).square().mean()
    return result


def _consolidate_on(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    memory = consolidate(Heads(), data("ab"[rank]), "both", loss_fn=loss_of)
    (folder / f"{rank}.txt").write_text(" ".join(memory.touched or ()))
    sliced = consolidate(Sliced(), [torch.full((2, 4), rank + 1.0)], loss_fn=sliced_loss)
    torch.save(sliced.to_tensors(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_what_one_rank_used_is_used(tmp_path: Path) -> None:
    # processes of their own: forked ones cannot differentiate once this one has, with a CUDA torch
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "heads.a.bias" in first.split()
    assert "heads.b.bias" in first.split()
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    K = Consolidation.from_tensors(one).layers["qkv"].covariance.dense()
    energy = torch.tensor([1.0 + 4, 1 + 36, 1 + 36], dtype=torch.float64)  # both ranks' inputs
    want = (energy / energy.mean())[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(K, want, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    _consolidate_on(int(sys.argv[1]), Path(sys.argv[2]))
