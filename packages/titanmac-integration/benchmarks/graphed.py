"""A training step as one CUDA graph: what the benchmarks use so that a busy host does not count.

Where blocks move, steps that collect statistics of absent blocks run as they are unless asked, the
others are replayed: topology changes in place, and so in the graph's memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cms_topology import sparse_layers

WARM_UP = 3


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    autocast: bool,
    clip: float | None = 1.0,
    graph: bool,
    sampling: bool = False,
    **options: object,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of tokens and labels that does one step and returns the loss, cut off.

    With ``graph`` the learning rates of ``optimizer`` must be tensors, and the optimizer
    capturable; nothing is learned from ``tokens`` and ``labels``, which only show the shape.
    After a step the gradients are there for a `TopologyManager` to read. With ``sampling`` steps
    that collect statistics of absent blocks are replayed, too, from a graph of their own.
    ``options`` go to the model.
    """
    inputs, targets = tokens.clone(), labels.clone()
    sparse = list(sparse_layers(model).values())

    def once() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        device = inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=not graph):
            loss = model(inputs, targets, **options)["loss"]
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.detach()

    if not graph:

        def eager(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            inputs.copy_(tokens)
            targets.copy_(labels)
            return once()

        return eager

    collecting = [layer.collect_candidates for layer in sparse]
    rates = [group["lr"].clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].zero_()
    with_gradients = [*model.parameters(), *(layer._probe for layer in sparse)]

    def capture(collects: bool) -> Callable[[], torch.Tensor]:
        for layer in sparse:
            layer.collect_candidates = collects
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                once()
        torch.cuda.current_stream().wait_stream(side)
        for parameter in with_gradients:
            parameter.grad = None
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            loss = once()
        gradients = [(parameter, parameter.grad) for parameter in with_gradients]

        def replay() -> torch.Tensor:
            captured.replay()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            return loss

        return replay

    plain = capture(False)
    sampled = capture(True) if sampling else None
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].copy_(rate)
    for layer, collects in zip(sparse, collecting, strict=True):
        layer.collect_candidates = collects

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.copy_(tokens)
        targets.copy_(labels)
        collects = [layer.collect_candidates for layer in sparse]
        if not any(collects):
            return plain()
        return sampled() if sampled is not None and all(collects) else once()

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
