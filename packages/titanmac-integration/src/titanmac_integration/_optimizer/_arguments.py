"""What the constructor of DeepNestedOptimizer is given, checked and turned into parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cms_topology import TopologyManager

from ._classify import discover_block_sparse_layers, groups_of_model, groups_of_parameters
from ._cms import ContinuumMemorySystem
from ._controller import LearningRateController
from ._momentum import DeepMomentum

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


def parameter_groups(
    params_or_model: nn.Module | Iterable[Any], cms: ContinuumMemorySystem, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups, each on one level."""
    if isinstance(params_or_model, nn.Module):
        return groups_of_model(params_or_model, cms, weight_decay)
    if isinstance(params_or_model, Tensor):
        raise TypeError(
            f"params_or_model (=Tensor {tuple(params_or_model.shape)}) must be a model or an "
            "iterable of parameters; put the tensor into a list."
        )
    return groups_of_parameters(params_or_model, cms)


def check_parts(**parts: tuple[Any, tuple[type, ...], str]) -> None:
    """Raise ``TypeError`` unless every part is None or of one of its classes.

    Args:
        **parts: value, classes and an example, by the name of the argument.
    """
    for name, (value, kinds, example) in parts.items():
        if value is not None and not isinstance(value, kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} (={value!r}) must be a {known}, for example {example}.")


def check_logger(logger: object) -> None:
    """Raise ``TypeError`` unless it can log, or is a path."""
    known = logger is None or isinstance(logger, (str, os.PathLike))
    if not known and not callable(getattr(logger, "log", None)):
        raise TypeError(
            f"logger (={logger!r}) must have log(metrics, step), or be the path of a file."
        )


def with_names(params: Tensor | Iterable[Any], group: int) -> list[Any]:
    """The (name, parameter) pairs of a group; parameters without names get "group2.0", ..."""
    given = [params] if isinstance(params, Tensor) else list(params)
    return [
        entry if isinstance(entry, tuple) else (f"group{group}.{place}", entry)
        for place, entry in enumerate(given)
    ]


def nested_settings(
    deep_momentum: DeepMomentum | bool,
    controller: LearningRateController | bool,
    *,
    fused: bool | None,
    capturable: bool,
    amsgrad: bool,
) -> tuple[DeepMomentum | None, LearningRateController | None]:
    """Settings of the nested parts that are on; True stands for the defaults."""
    memory = DeepMomentum() if deep_momentum is True else deep_momentum or None
    control = LearningRateController() if controller is True else controller or None
    if memory is not None and (fused or capturable or amsgrad):
        name = "fused" if fused else "capturable" if capturable else "amsgrad"
        raise ValueError(
            f"{name} (=True) must be off with deep_momentum, which has a step of its own."
        )
    if control is not None and capturable:
        raise ValueError(
            "capturable (=True) must be off with controller, whose factors pass through the host; "
            "use fused=True for speed."
        )
    return memory, control


def make_manager(
    optimizer: DeepNestedOptimizer, topology: Mapping[str, Any] | bool
) -> TopologyManager | None:
    """The manager of the sparse layers of the optimizer's model; None if there are none."""
    settings = dict(topology) if isinstance(topology, Mapping) else {}
    model, cms = optimizer.model, optimizer.cms
    if model is None or not discover_block_sparse_layers(model):
        if settings:
            raise ValueError(
                "topology (settings given) needs a model with CMSBlockLinear layers as "
                "params_or_model; make some with cms_topology.sparsify(model)."
            )
        return None
    if topology is False:
        return None
    if "periods" in settings and tuple(settings["periods"]) != cms.periods:
        raise ValueError(
            f"topology['periods'] (={settings['periods']}) must be those of cms (={cms.periods}): "
            "there is one clock; set them there."
        )
    # newborn steps are corrected by NewbornSteps, which knows the age in updates of a slow level
    settings |= {"periods": cms.periods, "correct_newborn_steps": False}
    return TopologyManager(model, optimizer, **settings)
