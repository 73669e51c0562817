"""An optimizer's step replayed from a CUDA graph."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 8
"""Steps that collect statistics have gradients of their own, and so has every shape of batch."""


class GraphedUpdate:
    """The step of Adam or AdamW, captured for the places that it reads and writes.

    A step whose gradients lie elsewhere than those of the step before, that hooks follow, or whose
    gradients somebody has exchanged is made as it is.

    Args:
        optimizer: one that :meth:`fits`; from now on it counts its steps and reads its learning
            rate on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        make_capturable(optimizer)
        self._replays: dict[Any, Callable[[], object]] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._places: Any = None
        self._places_before: Any = None
        self._replay: Callable[[], object] | None = None

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is a fused Adam or AdamW without hooks."""
        known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        return known and all(g["fused"] for g in optimizer.param_groups) and not hooked(optimizer)

    def look(self) -> None:
        """Find out where the next step will read and write, while the device is still at work."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._gradients = [(p, p.grad) for p in parameters]
        state = self._optimizer.state
        self._places_before = self._places
        self._places = tuple(
            (p.data_ptr(), g.data_ptr(), state[p]["exp_avg"].data_ptr() if p in state else None)
            for p, g in self._gradients
            if g is not None
        )
        self._replay = self._replays.get(self._places)

    def step(self) -> None:
        """Step, once."""
        exchanged = any(p.grad is not gradient for p, gradient in self._gradients)
        known = self._replay is not None
        if exchanged or hooked(self._optimizer) or not (known or self._may_capture()):
            with warnings.catch_warnings():  # torch asks whether this optimizer is ever captured
                warnings.filterwarnings("ignore", message="(?s).*capturable=True")
                self._optimizer.step()
            return
        if self._replay is None:
            self._replay = self._replays[self._places] = captured(self._optimizer)
        self._replay()

    def _may_capture(self) -> bool:
        """Whether places stay where they are, and no state would be made inside of a graph."""
        stays = self._places == self._places_before and len(self._replays) < MAX_GRAPHS
        return stays and all(moment is not None for _, _, moment in self._places)


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """What replays a step; none is made on the way."""
    graph = torch.cuda.CUDAGraph()
    with _without_collector(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        optimizer.step()
    return graph.replay


@contextmanager
def _without_collector() -> Iterator[None]:
    """Garbage may hold another graph, and one that is freed during a capture puts an end to it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody acts before or after every step of an optimizer."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(optimizer, name, None) for name in names)


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam count its steps and read its learning rate on the device."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
