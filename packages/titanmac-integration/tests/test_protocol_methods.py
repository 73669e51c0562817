"""Methods against forgetting: each does what its formula says, to a model small enough to check."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cms_topology import CMSBlockLinear, CMSClock, Rehearsal, sparse_layers
from titanmac_integration import TitanMAC, TitanMACConfig, create_titanmac_model
from titanmac_integration._protocol import _anchored, _kronecker, _origin
from titanmac_integration._protocol._cell import learn_first, run_cell
from titanmac_integration._protocol._method import Sampling
from titanmac_integration._protocol._methods import METHODS, Asked
from titanmac_integration._protocol._overlap import block_overlap, usage_of, weights_of
from titanmac_integration._protocol._phase import Decisions
from titanmac_integration._protocol._problems import additions, from_pairs
from titanmac_integration._protocol._settings import SETTINGS, Setting

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the old task from a few sequences."""
    for name, attribute, value in (
        ("ewc", "rows", 8),
        ("kronecker-ewc", "rows", 8),
        ("kronecker-ewc", "batches", 2),
        ("self-rehearsal", "rows", 16),
        ("ours", "batches", 2),
        ("ours", "probes", 4),
    ):
        monkeypatch.setattr(METHODS[name], attribute, value)


@pytest.fixture
def setting() -> Setting:
    small = {"d_model": 32, "n_heads": 4, "d_ff": 64, "n_layers": 1, "block_sparse_tile_size": 8}
    return SETTINGS["demo"].changed(
        steps=(4, 4),
        lr=(3e-3,),
        batch_size=(4,),
        changes=small,
        training={**SETTINGS["demo"].training, "seq_len": 32},
    )


@pytest.fixture
def model(tiny_config: Callable[..., TitanMACConfig]) -> TitanMAC:
    config = tiny_config(
        use_block_sparse=True,
        block_sparse_components=("mlp", "attention"),
        n_layers=1,
        n_persistent=0,
        tie_weights=False,
    )
    return create_titanmac_model(config, seed=0)


def sampling(batch_size: int = 4) -> Sampling:
    return Sampling(batch_size, 40, torch.Generator().manual_seed(0))


class OneStep:
    """As much of a trainer as ``on_backward`` needs."""

    def __init__(self, model: TitanMAC) -> None:
        self.model, self.device = model, CPU


def penalty_gradients(model: TitanMAC, method: Any) -> dict[str, Tensor]:
    """What ``on_backward`` adds to gradients that are zero, after the weights have moved."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        parameter.grad = torch.zeros_like(parameter)
    method.on_backward(OneStep(model), torch.tensor(0.0))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moved(model: TitanMAC, anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() - anchor[name] for name, p in model.named_parameters()}


def test_l2_pulls_back_in_proportion(model: TitanMAC) -> None:
    method = METHODS["l2"](0.5)
    method.remember(model, additions(seq_len=40), sampling())
    anchor = method.kept[0]
    grads = penalty_gradients(model, method)
    for name, change in moved(model, anchor).items():
        torch.testing.assert_close(grads[name], 0.5 * change, msg=name)


def test_ewc_weighs_by_the_fisher_information(model: TitanMAC) -> None:
    method = METHODS["ewc"](7.0)
    method.remember(model, additions(seq_len=40), sampling())
    anchor, fisher = method.kept[0]
    assert sum(float(f.sum()) for f in fisher.values()) > 0
    grads = penalty_gradients(model, method)
    for name, change in moved(model, anchor).items():
        torch.testing.assert_close(grads[name], 7.0 * fisher[name] * change, msg=name)


def test_the_fisher_information_is_the_expected_squared_score(model: TitanMAC) -> None:
    """With one token that counts, sum over all labels of p(y) (d log p(y))^2 is known exactly."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 5))
    labels = torch.full_like(tokens, -100)
    labels[0, 3] = tokens[0, 3]
    weight = model.head.weight  # type: ignore[union-attr]
    logits = model(tokens)["logits"][0, 2]
    exact = torch.zeros_like(weight)
    log_p = logits.log_softmax(0)
    for y in range(256):
        (grad,) = torch.autograd.grad(log_p[y], weight, retain_graph=True)
        exact += log_p[y].exp().detach() * grad.square()
    draws, total = 3000, torch.zeros_like(weight)
    hidden: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda m, x, y: hidden.append(y.detach()))
    model(tokens)
    handle.remove()
    for _ in range(draws):
        logits = (hidden[0] @ weight.T).requires_grad_()
        loss = _anchored.sampled_loss(logits, labels)
        (error,) = torch.autograd.grad(loss, logits)
        total += (error[0, 2, :, None] * hidden[0][0, 2]).square()
    assert torch.allclose((total / draws).sum(), exact.sum(), rtol=0.05)


def test_kronecker_ewc_is_the_quadratic_form_of_its_factors(model: TitanMAC) -> None:
    method = METHODS["kronecker-ewc"](3.0)
    method.remember(model, additions(seq_len=40), sampling())
    anchor, fisher, factors = method.kept[0]
    assert set(factors) == {*sparse_layers(model), "head"}
    assert set(fisher) | {f"{n}.values" for n in sparse_layers(model)} | {"head.weight"} == set(
        anchor
    )
    grads = penalty_gradients(model, method)
    layer = sparse_layers(model)["blocks.0.mlp.fc1"]
    inputs, errors = factors["blocks.0.mlp.fc1"]
    name = "blocks.0.mlp.fc1.values"
    change = (layer.values.detach() - anchor[name]).requires_grad_()
    dense = _kronecker._dense(layer, change)
    form = 1.5 * (errors @ dense @ inputs * dense).sum()
    (expected,) = torch.autograd.grad(form, change)
    torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-7)


def test_kronecker_factors_are_second_moments(model: TitanMAC) -> None:
    task = additions(seq_len=40)
    factors = _kronecker.kronecker_factors(model, task, sampling(), n_batches=1)
    batch = task.batch(4, 40, torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    layer = model.get_submodule("blocks.0.attention.out")
    handle = layer.register_forward_hook(lambda m, x, y: seen.append(x[0].flatten(0, 1)))
    model(batch.input_ids)
    handle.remove()
    x = seen[0].detach()
    inputs, errors = factors["blocks.0.attention.out"]
    torch.testing.assert_close(inputs, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    for factor in (inputs, errors):
        assert torch.linalg.eigvalsh(factor.double()).min() > -1e-6
        assert factor.abs().sum() > 0


def test_blocks_go_back_and_forth(model: TitanMAC) -> None:
    layer = sparse_layers(model)["blocks.0.mlp.fc2"]
    values = layer.values.detach()
    dense = _kronecker._dense(layer, values)
    torch.testing.assert_close(dense, layer.to_dense().detach())
    assert torch.equal(_kronecker._like_weight(layer, dense), values)


def small_tasks() -> list[Any]:
    """Two tasks with a handful of held-out problems each."""
    first = [(f"{i:02d}+=", f"{99 - i:02d}") for i in range(60)]
    second = [(f"{i:02d}=+", f"{i:02d}"[::-1]) for i in range(60)]
    return [from_pairs("complement", first, seq_len=32), from_pairs("mirror", second, seq_len=32)]


STARTS: dict[tuple[str, str], Any] = {}


def cell(setting: Setting, method: str, arch: str, dial: float | None = None) -> dict[str, Any]:
    """A cell; cells of one setting and architecture share the model after the first task."""
    tasks = small_tasks()
    key = (setting.key, arch)
    if key not in STARTS:
        STARTS[key] = learn_first(setting, tasks, arch, 0, CPU)
    return run_cell(setting, tasks, Asked(method, arch, dial), STARTS[key], CPU)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_runs_and_is_recorded(setting: Setting, name: str) -> None:
    record = cell(setting, name, METHODS[name].arch)
    assert record["failed"] is None
    assert record["id"].startswith(f"{setting.key}/{name}@")
    assert len(record["matrix"]) == 3
    assert all(len(row) == 2 for row in record["matrix"])
    assert record["path"][0][-1]["step"] == 4
    assert [at["step"] for at in record["curve"][0]] == [1, 2, 3, 4]
    if name == "fine-tuning":  # a guard projects once more when it is removed
        ends = {key: record[key][-1][1] for key in ("validation_nats", "nats")}
        assert record["curve"][0][-1] == {"step": 4, **ends}
    assert record["kept_bytes"] > 0 or not METHODS[name].keeps or name == "freeze-and-grow"
    assert record["seconds"][0] > 0


def test_a_dense_network_is_guarded_but_does_not_grow(setting: Setting) -> None:
    assert cell(setting, "ours-grown", "dense")["failed"] is None


def test_a_record_says_where_it_comes_from(setting: Setting) -> None:
    record = json.loads(json.dumps(cell(setting, "fine-tuning", "sparse")))
    assert record["settings"]["steps"] == [4, 4]
    assert record["settings"]["changes"]["d_model"] == 32
    assert record["seed"] == 0
    assert record["tested_on"] == [4, 4], "as many of six as fill rows"
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert set(record["versions"]) > {"titanmac-integration", "cms-topology"}
    assert datetime.fromisoformat(record["date"]).utcoffset() == timedelta(0)
    commit = record["commit"]  # None where the tests run against installed wheels
    assert commit is None or re.fullmatch("[0-9a-f]{7,}(-dirty)?", commit)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository that the code happens to be installed in."""
    installed = tmp_path / "site-packages" / "_origin.py"
    installed.parent.mkdir()
    installed.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(_origin, "__file__", str(installed))
    assert _origin.commit.__wrapped__() is None
    subprocess.run([*git, "add", str(installed)], check=True)
    assert re.fullmatch("[0-9a-f]{7,}-dirty", _origin.commit.__wrapped__())
    monkeypatch.setenv("PATH", "")
    assert _origin.commit.__wrapped__() is None


def test_methods_begin_at_the_same_checkpoint(setting: Setting) -> None:
    records = [
        cell(setting, *what) for what in (("fine-tuning", "sparse"), ("l2", "sparse", 100.0))
    ]
    assert records[0]["nats"][:2] == records[1]["nats"][:2]
    assert records[0]["nats"][2] != records[1]["nats"][2]
    STARTS.clear()
    assert cell(setting, "fine-tuning", "sparse")["nats"] == records[0]["nats"], "reproducible"


def test_a_task_that_is_kept_in_part_is_rehearsed(setting: Setting) -> None:
    plain = cell(setting, "fine-tuning", "sparse")["nats"][-1][0]
    for name in ("joint", "real-rehearsal"):
        assert cell(setting, name, "sparse", 1.0)["nats"][-1][0] < plain, name


def test_the_guard_and_rehearsal_go_together(setting: Setting, model: TitanMAC) -> None:
    method = METHODS["ours-rehearsing"]()
    task = additions(seq_len=40)
    for _ in range(2):
        method.remember(model, task, sampling())
    memory, *written = method.kept
    assert memory.tasks == ["arithmetic", "arithmetic"]
    assert [tuple(kept["input_ids"].shape) for kept in written] == [(16, 40), (16, 40)]
    method._rehearsal = Rehearsal(model, written, weight=method.weight)
    grads = penalty_gradients(model, method)
    rows = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    for kept, chosen in zip(written, rows, strict=True):
        tokens = kept["input_ids"][chosen]
        (0.3 * model(tokens, tokens)["loss"]).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, msg=name)
    record = cell(setting, "ours-rehearsing", "spare")
    assert record["method_metrics"]["retention/eps"] == record["dial"] == 0.01
    assert "retention/budget" not in record["method_metrics"]


def test_answers_are_recalled_instead_of_draws(setting: Setting, model: TitanMAC) -> None:
    method = METHODS["ours-recalling"]()
    task = additions(seq_len=40)
    method.remember(model, task, sampling())
    _, kept = method.kept
    assert sorted(kept) == ["answer_classes", "answer_log_probs", "input_ids"]
    beginnings = task.batch(64, 40, sampling().generator).input_ids[:, :4]
    assert len(kept["input_ids"][:, :4].unique(dim=0)) <= len(beginnings.unique(dim=0))
    assert float(Rehearsal(model, [kept]).loss().detach()) < 1e-4, "nothing to repair yet"
    method._rehearsal = Rehearsal(model, [kept], weight=method.weight)
    grads = penalty_gradients(model, method)
    model.zero_grad()
    Rehearsal(model, [kept], weight=3.0).loss().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, msg=name)
    record = cell(setting, "ours-recalling", "spare")
    assert record["method_metrics"]["retention/eps"] == record["dial"] == 0.1


def test_damping_lets_go_in_the_course_of_a_task(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    strength = METHODS["ours-releasing"]._strength

    def spy(self: Any) -> dict[str, Any]:
        asked.append(strength(self))
        return asked[-1]

    monkeypatch.setattr(METHODS["ours-releasing"], "_strength", spy)
    cell(setting, "ours-releasing", "spare")
    assert asked == [{"drift": None, "eps": 0.3, "release": setting.steps[1]}]


def test_losses_after_decisions_are_compared_with_those_before() -> None:
    """Steps count from the start of the task; where the topology stands still nothing is found."""
    manager = SimpleNamespace(freeze_after=108, clock=CMSClock((1, 2, 4)), global_step=100)
    trainer: Any = SimpleNamespace(step=100, manager=manager)
    decisions = Decisions()
    decisions.on_fit_start(trainer, None, 30)
    for step in range(101, 131):
        manager.global_step = step
        decisions.on_backward(trainer, torch.tensor(3.0 if step == 106 else 1.0))
        decisions.on_step(trainer, step)
    assert [step for step, _ in decisions.ratios] == [4, 8]
    assert decisions.ratios[0][1] == pytest.approx(3.0)
    assert decisions.ratios[1][1] < 1.0, "the mean before the second decision holds the 3"


@pytest.mark.parametrize("name", ["ours-swapping", "ours-grown-swapping"])
def test_swaps_and_losses_after_them_are_recorded(setting: Setting, name: str) -> None:
    swapping = setting.changed(
        steps=(4, 16), training={**setting.training, "level_periods": (1, 2, 4)}
    )
    record = cell(swapping, name, METHODS[name].arch)
    assert [step for step, _ in record["loss_ratios"][0]] == [4, 8]
    assert len(record["swap_rates"][0]) == 4
    still = cell(swapping, "ours", "sparse")
    assert still["loss_ratios"] == [[]]
    assert record["parameters"] == still["parameters"], "grown to the same size"


def test_frozen_blocks_stay_and_others_grow(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[tuple[CMSBlockLinear, Tensor]] = []
    method = METHODS["freeze-and-grow"]
    started = method.on_fit_start

    def spy(self: Any, trainer: Any, task: object, steps: int) -> None:
        for layer in sparse_layers(trainer.model).values():
            layers.append((layer, layer.values.detach()[:, : layer.num_live].clone()))
        started(self, trainer, task, steps)

    monkeypatch.setattr(method, "on_fit_start", spy)
    cell(setting, "freeze-and-grow", "spare")
    assert layers
    for layer, before in layers:
        assert torch.equal(layer.values.detach()[:, : before.shape[1]], before)
        assert layer.num_live > before.shape[1]
        assert layer.density == pytest.approx(0.5)
        assert layer.values.detach()[:, before.shape[1] :].abs().sum() > 0


def test_fine_tuning_uses_capacity_that_was_left_free(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    densities: list[float] = []
    ended = METHODS["fine-tuning"].on_fit_end

    def spy(self: Any, trainer: Any, report: Any) -> None:
        densities.extend(layer.density for layer in sparse_layers(trainer.model).values())
        ended(self, trainer, report)

    monkeypatch.setattr(METHODS["fine-tuning"], "on_fit_end", spy)
    cell(setting, "fine-tuning", "spare")
    assert densities
    assert set(densities) == {0.5}


def test_a_strict_guard_keeps_what_plain_training_loses(setting: Setting) -> None:
    longer = setting.changed(steps=(4, 12))
    plain = cell(longer, "fine-tuning", "sparse")["nats"]
    kept = cell(longer, "ours", "sparse", 1e-6)["nats"]
    assert abs(kept[2][0] - kept[1][0]) < 0.01 * abs(plain[2][0] - plain[1][0])


def test_without_eps_nothing_is_lost(setting: Setting) -> None:
    nats = cell(setting, "ours-fixed-eps", "sparse", 0.0)["nats"]
    assert abs(nats[2][0] - nats[1][0]) < 1e-3


def test_a_training_that_breaks_down_is_a_record(setting: Setting) -> None:
    wild = setting.changed(training={**setting.training, "max_nonfinite": 1, "grad_clip": 0.0})
    record = cell(wild, "l2", "sparse", float("inf"))
    assert "no finite loss" in record["failed"]
    assert len(record["matrix"]) == 2


def test_settings_are_checked() -> None:
    demo = SETTINGS["demo"]
    assert demo.changed(steps=(5,)).steps == (5, 5)
    assert demo.changed(steps=(5,)).key != demo.key
    for changes, message in (
        ({"steps": (1, 2, 3)}, r"steps \(=\(1, 2, 3\)\) must have one entry per task \(2\)"),
        ({"tasks": ("prose",), "steps": (5,), "lr": (1,), "batch_size": (4,)}, "at least two"),
        ({"steps": (0,)}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.changed(**changes)
    for setting in SETTINGS.values():
        sizes = {}
        for arch in ("sparse", "spare", "dense", "narrow"):
            model = create_titanmac_model(setting.config(arch), device="meta")
            sizes[arch] = model.num_parameters
        assert sizes["sparse"] == sizes["spare"] < sizes["dense"]
        assert sizes["narrow"] == pytest.approx(sizes["sparse"], rel=0.06), setting.name


def test_overlap_of_blocks() -> None:
    config = SETTINGS["demo"].changed(changes={"n_layers": 1}).config("sparse")
    model = create_titanmac_model(config, seed=0)
    layers = sparse_layers(model)
    generator = torch.Generator().manual_seed(0)
    usage = {n: torch.rand(x.R, x.C, generator=generator) for n, x in layers.items()}
    before = weights_of(model)
    same = block_overlap(model, usage, usage, before)
    assert same["used"] == 1.0
    assert same["used_shuffled"] < 0.6
    assert same["chance"] == pytest.approx(1 / 3)
    opposite = {name: -value for name, value in usage.items()}
    assert block_overlap(model, usage, opposite, before)["used"] == 0.0
    with torch.no_grad():  # change the blocks that are used most
        for name, layer in layers.items():
            used = usage[name].gather(1, layer.col_indices[:, : layer.num_live].long())
            layer.values[:, : layer.num_live] += used[:, :, None, None]
    assert block_overlap(model, usage, opposite, before)["changed"] == 1.0


def test_usage_is_measured_per_block(model: TitanMAC) -> None:
    usage = usage_of(model, additions(seq_len=40), sampling())
    for name, layer in sparse_layers(model).items():
        assert usage[name].shape == (layer.R, layer.C)
        assert (usage[name] > 0).any()
