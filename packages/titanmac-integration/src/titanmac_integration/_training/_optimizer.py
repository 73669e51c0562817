"""The optimizer that the settings ask for, and the manager of the topology."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cms_topology import TopologyManager, sparse_layers
from titanmac_integration._optimizer import DeepNestedOptimizer
from titanmac_integration._optimizer._cms import ContinuumMemorySystem

from ._config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or :class:`DeepNestedOptimizer` with the parts that are switched on.

    Both in the fused form where parameters are on a CPU or CUDA device: one pass over all of them.
    """
    device = next(model.parameters()).device.type
    fused = device in ("cpu", "cuda") and not config.deep_momentum
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=betas,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return DeepNestedOptimizer(
        model,
        lr=config.lr,
        betas=betas,
        weight_decay=config.weight_decay,
        fused=fused or None,
        cms=ContinuumMemorySystem(config.level_periods, config.cms_levels or None),
        deep_momentum=config.deep_momentum,
        controller=config.lr_controller,
        topology={"seed": config.seed} if getattr(model, "block_sparse_layers", None) else True,
    )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the trainer can train ``model`` with it."""
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"optimizer (={optimizer!r}) must be an optimizer, made of the model's parameters."
        )
    check_no_closure(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            f"optimizer (={type(optimizer).__name__}) must hold parameters of model "
            f"(={type(model).__name__}), and holds none of them; make it from this model."
        )


def check_no_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` if it cannot step without a closure, as ours and other trainers do."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer (={type(optimizer).__name__}) must step without a closure; it asks for the "
            "loss several times per step, which Trainer does not compute. Take another, or write "
            "the loop yourself: optimizer.step(closure), then TopologyManager.step()."
        )


def make_manager(
    model: nn.Module, config: TrainingConfig, optimizer: torch.optim.Optimizer
) -> TopologyManager | None:
    """The one that ``optimizer`` drives, else a new one; None for a dense model."""
    driven: TopologyManager | None = getattr(optimizer, "topology", None)
    if driven is not None or not sparse_layers(model):
        return driven
    return TopologyManager(model, optimizer, periods=config.level_periods, seed=config.seed)


def set_rate(optimizer: torch.optim.Optimizer, rate_of: Callable[[float], float]) -> None:
    """Give every group the rate that its peak leads to; one that a graph reads in place."""
    for group in optimizer.param_groups:
        rate = rate_of(group["initial_lr"])
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
