"""Many small launches as one: a function of tensors that stay where they are, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 2


class CapturedCall:
    """Calls a function, and on a GPU, after some calls, replays what it launched.

    Args:
        run: launches work that depends on nothing but the contents of tensors, and leaves its
            results in tensors that exist already.
        operands: tensors it reads and writes that others own; if one of them moves to other memory,
            the work is captured anew.
    """

    def __init__(self, run: Callable[[], None], operands: Sequence[Tensor]) -> None:
        self._run, self._operands = run, list(operands)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: list[int] = []
        self._calls = 0

    def __call__(self) -> None:
        """Have the work done."""
        if torch.cuda.is_current_stream_capturing():  # somebody else's graph, which takes us along
            self._run()
            return
        self._calls += 1
        if self._calls <= WARM_UPS:
            self._run()
            return
        places = [t.data_ptr() for t in self._operands]
        if self._graph is None or places != self._places:
            self._places = places
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._run()
        self._graph.replay()
