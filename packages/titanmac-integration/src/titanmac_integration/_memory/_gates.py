"""How far a step made at one token reaches: the double decay of momentum and memory.

Legend: N sequences times heads, b tokens of a chunk. Titans, section 3.1 and 3.2:
S_t = eta_t S_{t-1} + u_t,  M_t = (1 - alpha_t) M_{t-1} + S_t,  with u_t = -theta_t grad l(M; x_t).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ALPHA = 0.1
"""Largest share of the memory that one token may erase: a memory must not vanish by accident."""
MAX_STEP = 1.0
"""Largest 2 theta. With keys of length 1 a step of 1 makes the memory answer exactly."""
MIN_LOG_ETA = -10.0
"""Momentum below exp(-10) is none; sums of larger logarithms would cost float32 its digits."""
START_ALPHA, START_ETA, START_STEP = 0.001, 0.1, 0.5
"""Values of the gates before training; half of a memory lasts about 700 tokens."""


class Gates(NamedTuple):
    """Gates of every token, [..., tokens] each."""

    log_keep: Tensor
    """log(1 - alpha), in [log(1 - MAX_ALPHA), 0]."""
    log_eta: Tensor
    """log of the share of the momentum that stays, at most 0."""
    step: Tensor
    """2 theta, in [0, MAX_STEP]: the gradient of a squared error has that factor."""

    @classmethod
    def from_logits(cls, logits: Tensor, max_step: float) -> "Gates":
        """Gates from the outputs of a linear layer, [3, ...]: alpha, eta, theta."""
        alpha, eta, theta = logits.unbind(0)
        return cls(
            torch.log1p(-MAX_ALPHA * torch.sigmoid(alpha)),
            torch.nn.functional.logsigmoid(eta).clamp(min=MIN_LOG_ETA),
            max_step * torch.sigmoid(theta),
        )


class Kernel(NamedTuple):
    """The recurrences of one chunk, unrolled: what weighs how much after token t.

    M_t = keep_t M_0 + carry_t S_0 + sum_{i <= t} reach_{t,i} u_i
    S_t = decay_t S_0 + sum_{i <= t} fade_{t,i} u_i
    """

    keep: Tensor
    """[..., b]"""
    carry: Tensor
    """[..., b]"""
    decay: Tensor
    """[..., b]"""
    reach: Tensor
    """[..., b, b], lower triangular"""
    fade_last: Tensor
    """[..., b]: fade_{b,i}, the only row of it that is needed"""


def momentum_kernel(gates: Gates) -> Kernel:
    """Unroll the recurrences of chunks: gates [..., b] -> :class:`Kernel`.

    Products of gates are differences of summed logarithms, none of which is above 0: nothing
    overflows, and a gate near 0 is no division by 0.
    """
    log_keep, log_decay = gates.log_keep.cumsum(-1), gates.log_eta.cumsum(-1)
    keeps, fades = _ratios(log_keep), _ratios(log_decay)
    decay = log_decay.exp()
    return Kernel(
        keep=log_keep.exp(),
        carry=(keeps @ decay[..., None])[..., 0],
        decay=decay,
        reach=keeps @ fades,
        fade_last=fades[..., -1, :],
    )


def before(values: Tensor, first: float) -> Tensor:
    """Values of the token before: [..., b] with ``first`` in front and the last one gone."""
    return torch.nn.functional.pad(values[..., :-1], (1, 0), value=first)


def rows_before(matrix: Tensor) -> Tensor:
    """Rows of the token before: [..., b, b] with a row of zeros in front and the last one gone."""
    return torch.nn.functional.pad(matrix[..., :-1, :], (0, 0, 1, 0))


def _ratios(logs: Tensor) -> Tensor:
    """exp(logs_t - logs_i) for i <= t, else 0: [..., b] -> [..., b, b]."""
    size = logs.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=logs.device).triu(1)
    # masked before exp, or its gradient would be 0 times infinity
    return (logs[..., :, None] - logs[..., None, :]).masked_fill(future, -torch.inf).exp()
