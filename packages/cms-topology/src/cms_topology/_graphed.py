"""Gradients from a CUDA graph: the host launches one thing a step in place of hundreds of kernels.

A block-sparse layer computes less, but the host has at least as much to do for it as for a dense
one. Where the host sets the pace, sparse steps are therefore no faster than dense ones, unless they
are replayed.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cms_topology._convert import sparse_layers
from cms_topology._devices import on

WARM_UP = 3
"""Calls that run as they are before one is captured: kernels are compiled, workspaces allocated.

Of these one at least is like that which is captured.
"""


_REQUIRES_GRAD = attrgetter("requires_grad")


class _Recorded(NamedTuple):
    """One captured call."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    """What the graph reads."""
    result: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    """Every leaf that the call leaves a gradient in, with that gradient."""


class GraphedBackward:
    """Runs a function that computes a loss and its gradients, from a CUDA graph once it is known.

    ```python
    def gradients(x, y):
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    backward = GraphedBackward(gradients, model)
    for x, y in batches:
        optimizer.zero_grad()
        loss = backward(x, y)  # in place of gradients(x, y)
        optimizer.step()
        manager.step()
    ```

    The first three calls run as they are, and later on every first one with inputs of a new shape;
    then a call is captured, and from there on calls are replayed. Every call is a real one: nothing
    is learned twice. Gradients are
    there afterwards as usual, for clipping, hooks of the optimizer and a `TopologyManager`. Blocks
    may move: topology changes in place, and so in the graph's memory. Steps that collect statistics
    of absent blocks have a graph of their own, except with `candidate_score="loss"`: those run as
    they are. So does a call that finds gradients of an earlier one, for it adds to them (a warning
    says so, once); to accumulate over parts of a batch let `function` do so. Graphs are dropped
    when a layer has grown or a parameter has moved to other memory.

    Between two calls only tensors may change, and in place: what `function` reads from Python
    (numbers, flags, modules and their hooks) is what it was when it was captured. After such a
    change call `forget`. On a CPU, and without a GPU, there is nothing to capture: `function` runs
    as it is, with a warning, once.

    Args:
        function: takes tensors, calls `backward` on what it computes, and returns a 0-d loss. It
            must not wait for the device (`.item()`, `.cpu()`, `if tensor:`).
        model: whose parameters get the gradients; on one CUDA device.
        max_graphs: different shapes (and kinds of step) that are captured; a warning says, once,
            when there are more. Each keeps gradients of its own.
        generators: CUDA generators that `function` draws from, besides the default one.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        model: nn.Module,
        *,
        max_graphs: int = 4,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs (={max_graphs}) must be at least 1.")
        self._function, self._model = function, model
        self._max_graphs, self._generators = max_graphs, list(generators)
        self._layers = list(sparse_layers(model).values())
        self._warned: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: the next calls run as they are, then one is captured anew."""
        self._graphs: dict[Any, _Recorded] = {}
        self._calls: Counter[Any] = Counter()
        # looked through at every call, while the device has nothing to do
        self._holders = [m._parameters for m in self._model.modules() if m._parameters]
        self._pool: Any = None
        self._memory: Any = None

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, 0-d and detached; gradients are left as `function` leaves them.

        Args:
            inputs: for `function`; brought to the model's device without waiting for it, so do not
                write into pinned ones before it has read them.

        Raises:
            RuntimeError: `function` did what a graph cannot hold. Torch 2.11 leaves its CUDA
                generator unusable then: random numbers on the device, dropout too, fail in this
                process from there on with "Offset increment outside graph capture".
        """
        device = next(self._model.parameters()).device
        if not capturable(device):
            self._warn(
                f"model (on {device}) must be on a CUDA device for its steps to be captured in a "
                "graph; they run as they are. Move the model to one, or leave GraphedBackward out."
            )
            return self._plain(inputs, device)
        given = [_pinned(tensor, device) for tensor in inputs]
        leaves = self._leaves()
        if any(leaf.grad is not None for leaf in leaves):
            self._warn(
                "gradients of an earlier call are there, so this one runs as it is and adds to "
                "them. Clear them before (optimizer.zero_grad(set_to_none=True)); to accumulate, "
                "let function go over all parts of a batch."
            )
            return self._plain(given, device)
        if not self._fixed():
            return self._plain(given, device)
        memory = self._addresses(leaves)
        if memory != self._memory:
            self.forget()
            self._memory = memory
        key = self._key(given)
        recorded = self._graphs.get(key)
        if recorded is None:
            if not self._calls[key] or self._calls.total() < WARM_UP:
                self._calls[key] += 1
                with on(device):
                    return beside(lambda: self._plain(given, device))
            if len(self._graphs) == self._max_graphs:
                self._warn(
                    f"inputs of {len(self._graphs)} shapes (=max_graphs) are captured; steps with "
                    f"others (now {[tuple(x.shape) for x in given]}) run as they are. Raise "
                    "max_graphs, or let batches have fewer shapes."
                )
                return self._plain(given, device)
            with on(device):
                recorded = self._graphs[key] = self._record(given, leaves, device)
        for kept, tensor in zip(recorded.inputs, given, strict=True):
            kept.copy_(tensor, non_blocking=True)
        recorded.replay()
        for leaf, gradient in recorded.gradients:
            leaf.grad = gradient
        return recorded.result.clone()

    def _plain(self, given: Sequence[Tensor], device: torch.device) -> Tensor:
        return self._function(*(x.to(device, non_blocking=True) for x in given)).detach()

    def _record(self, given: list[Tensor], leaves: list[Tensor], device: torch.device) -> _Recorded:
        inputs = [tensor.to(device, copy=True) for tensor in given]
        try:
            replay, result, self._pool = capture(
                lambda: self._function(*inputs).detach(), self._generators, self._pool
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"function could not be captured in a CUDA graph: {str(error).splitlines()[0]} It "
                "must not wait for the device (.item(), .cpu(), if tensor:) and not make shapes "
                "from data; or call it as it is, without GraphedBackward. Start the process anew: "
                "after a failed capture torch may refuse to draw random numbers on the device."
            ) from error
        gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
        return _Recorded(replay, inputs, result, gradients)

    def _leaves(self) -> list[Tensor]:
        """Everything that a backward pass may leave a gradient in."""
        parameters = [p for held in self._holders for p in held.values() if p is not None]
        statistics = [p for x in self._layers for p in (x._probe, x._fisher_probe) if p is not None]
        return parameters + statistics

    def _fixed(self) -> bool:
        """Whether the layers would do now what a captured call does."""
        for layer in self._layers:
            if layer._is_stale():  # indices written to from outside are checked, and more rebuilt
                return False
            if layer.collect_candidates and layer.scorer.config.candidate_score == "loss":
                return False
        return True

    def _addresses(self, leaves: list[Tensor]) -> Any:
        """Where a graph reads and writes."""
        places = [*map(Tensor.data_ptr, leaves)], [*map(_REQUIRES_GRAD, leaves)]
        return places, [(x.num_live, x.col_indices.data_ptr()) for x in self._layers]

    def _key(self, inputs: list[Tensor]) -> Any:
        """What makes two calls the same to a graph."""
        return (
            tuple((x.shape, x.stride(), x.dtype) for x in inputs),
            tuple(layer.collect_candidates for layer in self._layers),
            self._model.training,
            (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
        )

    def _warn(self, message: str) -> None:
        start = message.partition("(")[0]
        if start not in self._warned:
            self._warned.add(start)
            warnings.warn(message, stacklevel=3)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """What can be copied to a device without waiting for it."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor


def capturable(device: torch.device) -> bool:
    """Whether work on a device can be captured."""
    return device.type == "cuda"


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all, for memory that was used on a stream stays with it."""
    return torch.cuda.Stream(device)


def beside(work: Callable[[], Tensor]) -> Tensor:
    """Run before a capture, on another stream, as torch's notes on CUDA graphs ask for it.

    (What autograd allocates for a parameter remembers the stream of its first use.)
    """
    current = torch.cuda.current_stream()
    stream = _side(current.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = work()
    current.wait_stream(stream)
    return result


def capture(
    work: Callable[[], Tensor], generators: Sequence[torch.Generator], pool: Any
) -> tuple[Callable[[], None], Tensor, Any]:
    """What replays `work`, where its result will be, and the pool that its memory comes from.

    Graphs may share a pool, since they never run at the same time and each keeps its own results.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    torch.clear_autocast_cache()  # copies of weights made before would be read for ever
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()  # garbage may hold another graph; freed during a capture it puts an end to it
    try:
        # other threads may go on, such as one that pins memory for a data loader
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    finally:
        if enabled:
            gc.enable()
    torch.clear_autocast_cache()
    return graph.replay, result, graph.pool()
