"""Which inputs reach which weight matrix, seen from outside the model.

Legend: N tokens of a pass, n inputs and m outputs of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._convolution import DIMENSIONS, Convolution
from cms_topology._retention._touched import parameters_in

Rows = Callable[[Tensor], Tensor]
"""From the input of a product to its tokens [N, n]; what makes them larger is done when asked."""
OnLinear = Callable[[Tensor, Tensor, Tensor, Rows], None]
"""Called with the weight parameter, its input, its output [..., m], and how to read the input."""
OnRows = Callable[[Tensor, Tensor], None]
"""Called with an embedding's weight parameter and the indices that were looked up."""
OnUse = Callable[[Tensor], None]
"""Called with every parameter that is an argument of a torch function, perhaps several times."""


class _Products(TorchFunctionMode):
    """Sees every `functional.linear`, convolution and embedding, whoever calls it.

    So an embedding matrix that also serves as the head is found although no `nn.Linear` holds it.
    """

    def __init__(self, on_linear: OnLinear, on_rows: OnRows, on_use: OnUse) -> None:
        super().__init__()
        self.on_linear, self.on_rows, self.on_use = on_linear, on_rows, on_use

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for parameter in parameters_in((args, kwargs)):
            self.on_use(parameter)
        if func is functional.multi_head_attention_forward:
            # torch shows a mode this call as one; the products inside are found by their name
            with _replaced_linear(self._seen_linear):
                return func(*args, **kwargs)
        if func is functional.linear:
            return self._seen_linear(*args, **kwargs)
        if func in DIMENSIONS:
            return self._seen_convolution(func, Convolution(*args, **kwargs))
        result = func(*args, **kwargs)
        if func is functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if isinstance(weight, nn.Parameter):
                self.on_rows(weight, args[0] if args else kwargs["input"])
        return result

    def _seen_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = _LINEAR(input, weight, bias)
        if isinstance(weight, nn.Parameter):
            result = _own(result)
            self.on_linear(weight, input, result, _flat)
        return result

    def _seen_convolution(self, func: Any, call: Convolution) -> Tensor:
        result: Tensor = func(*call)
        if call.groups != 1 or not isinstance(call.weight, nn.Parameter):
            return result
        channels = -1 - DIMENSIONS[func]
        moved = _own(result.movedim(channels, -1))
        self.on_linear(call.weight, call.input, moved, call.windows)
        return moved.movedim(-1, channels)


_LINEAR = functional.linear


@contextmanager
def _replaced_linear(function: Callable[..., Tensor]) -> Iterator[None]:
    functional.linear = function
    try:
        yield
    finally:
        functional.linear = _LINEAR


@contextmanager
def captured(
    model: nn.Module, on_linear: OnLinear, on_rows: OnRows, on_use: OnUse
) -> Iterator[None]:
    """Report every matrix product, embedding look-up and use of a parameter inside the block.

    Compiled parts of the model run eagerly, so that nothing is hidden in a graph. Of
    `nn.MultiheadAttention` the output's product is seen, and the inputs' where query, key and value
    are one tensor; else torch multiplies with slices of the parameter, which counts as unseen.
    """

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, CMSBlockLinear)
        output = _own(output)
        on_linear(layer.values, args[0], output, _flat)
        return output

    sparse = [m for m in model.modules() if isinstance(m, CMSBlockLinear)]
    handles = [layer.register_forward_hook(hook) for layer in sparse]
    try:
        with _eager(), _Products(on_linear, on_rows, on_use):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _own(output: Tensor) -> Tensor:
    # a product may come as a view, and what then changes it in place cuts the view out of the graph
    return output.clone() if output.requires_grad else output


def _eager() -> AbstractContextManager[Any]:
    # importing the compiler to tell it to stay away would cost seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and all parameters differentiable inside; outside as before, with the random
    number generators."""
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[i for i in cuda if i is not None]):
        try:
            model.eval()
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)
            for module, training in modes.items():
                module.training = training
