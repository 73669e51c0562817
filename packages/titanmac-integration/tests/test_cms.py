"""The continuum memory system: the clock, and which parameter belongs to which level."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cms_topology import CMSClock
from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    classify_parameters,
)


def test_the_clock_is_that_of_the_topology() -> None:
    cms, clock = ContinuumMemorySystem((1, 4, 12)), CMSClock((1, 4, 12))
    assert [cms.step() for _ in range(24)] == [clock.due(s) for s in range(1, 25)]
    assert cms.global_step == 24
    assert cms.due(24) == (0, 1, 2)
    assert cms.due(1) == (0,)


def test_patterns_assign_levels_and_the_first_match_wins() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    cms = ContinuumMemorySystem(levels={"1.bias": 0, "1.*": 1, "2.*": 2})
    assert cms.assign(model) == {
        "0.weight": 0,
        "0.bias": 0,
        "1.weight": 1,
        "1.bias": 0,
        "2.weight": 2,
        "2.bias": 2,
    }
    assert set(ContinuumMemorySystem().assign(model).values()) == {0}


def test_a_function_assigns_levels_and_names_have_no_wrapper_prefix() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    cms = ContinuumMemorySystem(levels=lambda name, parameter: 2 if parameter.ndim > 1 else 0)
    assert cms.assign(compiled) == {"0.weight": 2, "0.bias": 0, "1.weight": 0, "1.bias": 0}
    assert cms.level_of("module._orig_mod.0.weight", torch.zeros(2, 2)) == 2


def test_names_have_nothing_of_wrappers_of_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[1] = torch.compile(checkpoint_wrapper(model[1]))
    cms = ContinuumMemorySystem(levels={"1.0.*": 1})
    levels = {"0.weight": 0, "0.bias": 0, "1.0.weight": 1, "1.0.bias": 1}
    assert cms.assign(torch.compile(model)) == levels
    optimizer = DeepNestedOptimizer(model, cms=cms)
    slow = {p for group in optimizer.param_groups if group["level"] == 1 for p in group["params"]}
    assert slow == set(model[1].parameters())


def test_parameters_whose_names_differ_by_a_wrapper_only_are_all_trained() -> None:
    model = nn.Module()
    model.module, model.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(3))
    names = ["weight", "module.weight"]
    assert [*classify_parameters(model)] == [*ContinuumMemorySystem().assign(model)] == names
    optimizer = DeepNestedOptimizer(model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"periods": (1, 10, 25)}, r"periods\[2\] \(=25\) must be a multiple"),
        ({"periods": (1, 10)}, "must have three entries"),
        ({"levels": {"a": 3}}, r"levels\['a'\] \(=3\) must be 0, 1 or 2"),
        ({"levels": {"a": True}}, "must be 0, 1 or 2"),
        ({"levels": "mlp"}, r"levels \(='mlp'\) must be a mapping .* or a function"),
        ({"lr_scales": (1, 2)}, r"lr_scales \(=\(1, 2\)\) must be 3 finite numbers"),
        ({"lr_scales": (1, -2, 1)}, "must be 3 finite numbers of at least 0"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuumMemorySystem(**arguments)  # type: ignore[arg-type]


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    cms = ContinuumMemorySystem(levels={"0.*": 1, "block.*": 2})
    with pytest.raises(ValueError, match=r"pattern 'block.\*'\) must name at least one .*0.weight"):
        cms.assign(nn.Sequential(nn.Linear(2, 2)))


def test_a_function_that_returns_no_level() -> None:
    cms = ContinuumMemorySystem(levels=lambda name, parameter: 7)
    with pytest.raises(ValueError, match=r"level of 'weight' \(=7\) must be 0, 1 or 2"):
        cms.assign(nn.Linear(2, 2))


def test_state() -> None:
    cms = ContinuumMemorySystem((1, 2, 4))
    for _ in range(3):
        cms.step()
    other = ContinuumMemorySystem((1, 2, 4))
    other.load_state_dict(cms.state_dict())
    assert other.step() == (0, 1, 2)
    with pytest.raises(ValueError, match=r"periods \(=\[1, 10, 100\]\) differs .*\(1, 2, 4\)"):
        ContinuumMemorySystem().load_state_dict(cms.state_dict())
