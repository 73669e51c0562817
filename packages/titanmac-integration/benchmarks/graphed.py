"""A training step as one CUDA graph: what the benchmarks use so that a busy host does not count."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cms_topology import GraphedBackward

WARM_UP = 5
"""Steps after which everything is replayed that does not collect statistics of absent blocks."""


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    autocast: bool,
    clip: float | None = 1.0,
    graph: bool,
    **options: object,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of tokens and labels that does one step and returns the loss, cut off.

    With ``graph`` the update is in the graph, too: the learning rates of ``optimizer`` must be
    tensors, and the optimizer capturable. After a step the gradients are there for a
    `TopologyManager` to read. ``options`` go to the model.
    """

    def once(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        device = tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=not graph):
            loss = model(tokens, labels, **options)["loss"]
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.detach()

    run = GraphedBackward(once, model) if graph else once

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        return run(tokens, labels)

    return step


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def adamw(groups: list, lr: float, *, graph: bool, **options: object) -> torch.optim.AdamW:
    """Fused AdamW on a GPU, ready for capture if ``graph``."""
    on_gpu = torch.cuda.is_available()
    rate = torch.tensor(lr, device="cuda") if graph else lr
    if not graph:
        return torch.optim.AdamW(groups, lr=rate, fused=on_gpu, **options)
    groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
    for group in groups:
        group["lr"] = rate.clone()
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=True, **options)
