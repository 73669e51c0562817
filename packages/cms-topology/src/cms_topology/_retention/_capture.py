"""Which inputs reach which weight matrix, seen from outside the model."""

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
from cms_topology._retention._convolution import (
    DIMENSIONS,
    TRANSPOSED,
    Convolution,
    TransposedConvolution,
)
from cms_topology._retention._einsum import as_linear
from cms_topology._retention._layout import Layout
from cms_topology._retention._product import OnProduct, OnRows, Product, flat
from cms_topology._retention._recurrent import CELLS, LAYERS, run_cell, run_layer
from cms_topology._retention._touched import parameters_in
from cms_topology._retention._weights import WeightUses

OnUse = Callable[[Tensor], None]
"""Called with every parameter that is an argument of a torch function, perhaps several times."""
MATMULS = frozenset(
    (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
)
GROUPED = frozenset(
    getattr(of, name)
    for of, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(of, name)
)
"""One matrix per expert; of torch 2.8 and later."""


class _Products(TorchFunctionMode):
    """Sees every matrix product, convolution and embedding of a parameter, whoever calls it.

    So an embedding matrix that also serves as the head is found although no `nn.Linear` holds it.
    """

    def __init__(
        self, on_product: OnProduct, on_rows: OnRows, on_use: OnUse, uses: WeightUses
    ) -> None:
        super().__init__()
        self.on_product, self.on_rows, self.on_use, self.uses = on_product, on_rows, on_use, uses

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
            return self._seen_convolution(func, DIMENSIONS[func], Convolution(*args, **kwargs))
        if func in TRANSPOSED:
            call = TransposedConvolution(*args, **kwargs)
            return self._seen_convolution(func, TRANSPOSED[func], call)
        if func in MATMULS and not kwargs:
            return self._seen_matmul(*args)
        if func in GROUPED and len(args) > 1 and args[0].ndim == 2:
            return self._seen_experts(func, args, kwargs)
        if func is Tensor.__rmatmul__:
            return self._seen_matmul(args[1], args[0])
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return args[0] + self._seen_matmul(*args[1:])
        if func is torch.einsum and len(args) == 3:
            product = self._seen_einsum(*args)
            if product is not None:
                return product
        if func in LAYERS:
            return run_layer(LAYERS[func], args, self.on_product)
        if func in CELLS:
            return run_cell(CELLS[func], *args, on_product=self.on_product)
        if func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            args = (args[0], _number(args[1]))
        result = func(*args, **kwargs)
        if func in (functional.embedding, functional.embedding_bag):
            weight = self.uses.kernel(args[1] if len(args) > 1 else kwargs["weight"])
            if weight is not None:
                self.on_rows(weight, args[0] if args else kwargs["input"])
                return result
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of an attribute
            name = getattr(func.__self__, "__name__", name)
        self.uses.note(name, (args, kwargs), result)
        return result

    def _note_product(self, func: Any, input: Tensor, weight: Tensor, result: Tensor) -> None:
        name = func.__name__
        if not isinstance(weight, nn.Parameter):
            name += " of what is computed of it"
        self.uses.note(name, (input, weight), result)

    def _seen_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = _LINEAR(input, weight, bias)
        source = self.uses.matrix(weight)
        if source is None:
            self._note_product(_LINEAR, input, weight, result)
            return result
        result = _own(result)
        parameter, layout, first, span = source
        self.on_product(Product(parameter, input, result, flat, layout, first, span))
        return result

    def _seen_matmul(self, input: Tensor, other: Tensor) -> Tensor:
        left, right = (self.uses.parameters_of(t) is not None for t in (input, other))
        if right and not left and other.ndim == 3 and input.ndim >= 3:
            return self._seen_stack(input, other)
        if left == right or min(input.ndim, other.ndim) < 2 or (input if left else other).ndim > 2:
            result = torch.matmul(input, other)
            self._note_product(torch.matmul, input, other, result)
            return result
        # linear's weight is [m, n]
        return (
            self._seen_linear(input, other.mT) if right else self._seen_linear(other.mT, input).mT
        )

    def _seen_einsum(self, equation: Any, first: Any, second: Any) -> Tensor | None:
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return None
        of_weights = [self.uses.parameters_of(t) is not None for t in (first, second)]
        if of_weights == [False, True]:
            return as_linear(equation, first, second, self._seen_linear)
        if of_weights == [True, False] and isinstance(equation, str):
            operands, arrow, out = equation.partition("->")
            turned = ",".join(operands.split(",")[::-1]) + arrow + out
            return as_linear(turned, second, first, self._seen_linear)
        return None

    def _seen_stack(self, input: Tensor, other: Tensor) -> Tensor:
        """[..., G, N, n] by [G, n, m]: every group reads inputs of its own."""
        result = torch.matmul(input, other)
        source = self.uses.stack(other)
        if source is None:
            self._note_product(torch.matmul, input, other, result)
            return result
        G, n, m = other.shape

        def rows(x: Tensor) -> Tensor:
            x = x.expand(*x.shape[:-3], G, *x.shape[-2:])
            return x.movedim(-3, -2).reshape(-1, G, n)

        moved = _own(result.movedim(-3, -2).flatten(-2))
        self.on_product(Product(source.parameter, input, moved, rows, source.layout))
        return moved.unflatten(-1, (G, m)).movedim(-2, -3)

    def _seen_experts(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Consecutive tokens [N, n] by a matrix [G, n, m] each, up to the offsets."""
        result: Tensor = func(*args, **kwargs)
        input, other = args[:2]
        source = self.uses.stack(other)
        offsets = args[2] if len(args) > 2 else kwargs.get("offs")
        if source is None or offsets is None:
            self._note_product(func, input, other, result)
            return result
        parts, first = [], 0
        for expert, last in enumerate(offsets.tolist()):
            part = _own(result[first:last])
            told = (source.parameter, input[first:last], part, flat, source.layout, expert, 1)
            self.on_product(Product(*told))
            parts.append(part)
            first = last
        return torch.cat((*parts, result[first:]))

    def _seen_convolution(
        self, func: Any, dims: int, call: Convolution | TransposedConvolution
    ) -> Tensor:
        result: Tensor = func(*call)
        transposed = isinstance(call, TransposedConvolution)
        kernel = self.uses.kernel(call.weight, reshaped=not transposed)
        if kernel is None:
            self._note_product(func, call.input, call.weight, result)
            return result
        channels = -1 - dims
        moved = _own(result.movedim(channels, -1))
        layout = Layout(call.groups, transposed)
        self.on_product(Product(kernel, call.input, moved, call.windows, layout))
        return moved.movedim(-1, channels)


def _number(index: Any) -> Any:
    # by a number a matrix of a stack is a view, by a tensor that holds one a copy
    single = isinstance(index, Tensor) and index.ndim == 0 and index.dtype == torch.int64
    return int(index) if single else index


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
    model: nn.Module, on_product: OnProduct, on_rows: OnRows, on_use: OnUse
) -> Iterator[WeightUses]:
    """Report every matrix product, embedding look-up and use of a parameter inside the block.

    Compiled parts of the model run eagerly, so that nothing is hidden in a graph.

    Yields:
        What else parameters were used for; complete at the end of the block.
    """

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, CMSBlockLinear)
        output = _own(output)
        on_product(Product(layer.values, args[0], output))
        return output

    sparse = [m for m in model.modules() if isinstance(m, CMSBlockLinear)]
    uses = WeightUses(exempt=frozenset(layer.values for layer in sparse))
    handles = [layer.register_forward_hook(hook) for layer in sparse]
    try:
        with _eager(), _Products(on_product, on_rows, on_use, uses):
            yield uses
    finally:
        for handle in handles:
            handle.remove()


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
