"""Recurrent layers as products: every step of a sequence is a token, for two weights at once.

Legend: N tokens, all steps of all sequences, step by step (a packed sequence is stored so); g h
pre-activations of the gates, h outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology._retention._product import OnProduct, Product

LAYERS: dict[Callable[..., Any], str] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "tanh",
    torch.rnn_relu: "relu",
}
"""torch's functions of whole sequences, and the kind of cell."""
CELLS: dict[Callable[..., Any], str] = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "tanh",
    torch.rnn_relu_cell: "relu",
}
"""The same of single steps."""
_State = list[Tensor]
"""h, and c of an LSTM, [sequences, h] each."""


class _Steps:
    """A weight that multiplies the state, step by step, told of as one product.

    The gradient by all its outputs together is that by a zero which is added to them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int, like: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.inputs = like.new_zeros(tokens, weight.shape[1])
        self.zero = like.new_zeros(tokens, weight.shape[0])
        if torch.is_grad_enabled():
            self.zero = self.zero.requires_grad_().clone()

    def __call__(self, h: Tensor, at: slice) -> Tensor:
        self.inputs[at] = h.detach()
        return functional.linear(h, self.weight, self.bias) + self.zero[at]

    def tell(self, on_product: OnProduct) -> None:
        if isinstance(self.weight, nn.Parameter):
            on_product(Product(self.weight, self.inputs, self.zero))


def run_layer(kind: str, arguments: Sequence[Any], on_product: OnProduct) -> tuple[Tensor, ...]:
    """What torch's function of these arguments returns; every product of a parameter is told of.

    Args:
        kind: of the cell.
        arguments: of `torch.lstm` and its like: (input, state, weights, biases, layers, dropout,
            training, both directions, batch first), or with the sizes of a packed sequence's steps
            (input, sizes, state, weights, ...), without batch first.
        on_product: told of the products.
    """
    if isinstance(arguments[3], (list, tuple)):
        x, sizes, state, *rest = arguments
        steps = [int(size) for size in sizes]
        y, final = _layers(kind, x, steps, state, *rest, on_product=on_product)
    else:
        x, state, *rest, batch_first = arguments
        x = x.transpose(0, 1) if batch_first else x
        T, sequences = x.shape[:2]
        flat, final = _layers(
            kind, x.flatten(0, 1), [sequences] * T, state, *rest, on_product=on_product
        )
        y = flat.unflatten(0, (T, sequences))
        y = y.transpose(0, 1) if batch_first else y
    return (y, *final)


def run_cell(
    kind: str,
    input: Tensor,
    state: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    on_product: OnProduct,
) -> Any:
    """The same of a single step, torch.lstm_cell and its like."""
    found = [state] if isinstance(state, Tensor) else list(state)
    weights = (w_ih, w_hh, b_ih, b_hh, None)
    _, final = _direction(kind, input, [len(input)], found, *weights, False, on_product)
    return tuple(final) if kind == "lstm" else final[0]


def _layers(
    kind: str,
    x: Tensor,
    sizes: list[int],
    state: Any,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    both: bool,
    *,
    on_product: OnProduct,
) -> tuple[Tensor, list[Tensor]]:
    """x [N, n] -> [N, h], twice h in both directions, and the final states [layers, ...]."""
    given = [state] if isinstance(state, Tensor) else list(state)
    per = len(weights) // (layers * (1 + both))
    final: list[_State] = []
    for layer in range(layers):
        outputs = []
        for backwards in range(1 + both):
            i = len(final)
            w_ih, w_hh, *more = weights[i * per : (i + 1) * per]
            b_ih, b_hh = more[:2] if biases else (None, None)
            w_hr = more[-1] if len(more) % 2 else None
            begin = [each[i] for each in given]
            y, end = _direction(
                kind, x, sizes, begin, w_ih, w_hh, b_ih, b_hh, w_hr, bool(backwards), on_product
            )
            outputs.append(y)
            final.append(end)
        x = torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1:
            x = functional.dropout(x, dropout)
    return x, [torch.stack(parts) for parts in zip(*final, strict=True)]


def _direction(
    kind: str,
    x: Tensor,
    sizes: list[int],
    begin: _State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    backwards: bool,
    on_product: OnProduct,
) -> tuple[Tensor, _State]:
    """One layer in one direction: x [N, n] -> [N, h], and the final state of every sequence."""
    z = functional.linear(x, w_ih, b_ih)
    z = z.clone() if z.requires_grad else z
    if isinstance(w_ih, nn.Parameter):
        on_product(Product(w_ih, x, z))
    recurrent = _Steps(w_hh, b_hh, len(x), z)
    out = None if w_hr is None else _Steps(w_hr, None, len(x), z)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    steps = list(zip(starts, sizes, strict=True))
    outputs: list[Tensor] = []
    state = [part[: sizes[-1] if backwards else sizes[0]] for part in begin]
    ended: list[_State] = []
    for start, size in reversed(steps) if backwards else steps:
        had = len(state[0])
        if size < had:  # the shortest sequences, which stand last, have ended
            ended.append([part[size:] for part in state])
            state = [part[:size] for part in state]
        elif size > had:  # backwards, the shorter ones begin
            state = [
                torch.cat((part, new[had:size])) for part, new in zip(state, begin, strict=True)
            ]
        at = slice(start, start + size)
        state = _step(kind, z[at], recurrent(state[0], at), state)
        if out is not None:
            state[0] = out(state[0], at)
        outputs.append(state[0])
    for steps_told in (recurrent, out):
        if steps_told is not None:
            steps_told.tell(on_product)
    final = [torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)]
    return torch.cat(outputs[::-1] if backwards else outputs), final


def _step(kind: str, z: Tensor, recurrent: Tensor, state: _State) -> _State:
    """The state after one step from what the input and the state contribute to the gates."""
    if kind == "lstm":
        i, f, g, o = (z + recurrent).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]
    if kind == "gru":
        (r, u, n), (hr, hu, hn) = (part.chunk(3, 1) for part in (z, recurrent))
        new = (n + (r + hr).sigmoid() * hn).tanh()
        return [new + (u + hu).sigmoid() * (state[0] - new)]
    z = z + recurrent
    return [z.tanh() if kind == "tanh" else z.relu()]
