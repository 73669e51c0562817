"""A memory that is one matrix, exactly as if its tokens came one by one.

Legend: S batch, H heads, T tokens, b chunk, n chunks, D width. Rows are tokens: M [D, D] answers
query q with q M. The inner loss ||k M - v||^2 has the gradient 2 k^T (k M - v) of rank one, so a
chunk is described by its errors e_t = v_t - k_t M_{t-1}. M_{t-1} holds the errors before t, hence

    (I + L) E = V - K~ [M_0; S_0],   L_{t,i} = reach_{t-1,i} step_i (k_t . k_i)   for i < t

a triangular system: no stale gradient is needed (the "WY" way of the delta rule; Yang et al. 2024,
"Parallelizing Linear Transformers with the Delta Rule", section 3, here with the momentum and the
forgetting of Titans). What remains sequential is one affine map per chunk.
"""

import torch
from torch import Tensor

from ._gates import Gates, before, momentum_kernel, rows_before
from ._solve import solve_unit_lower
from ._state import Weights


def linear_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    weights: Weights,
    momentum: Weights,
    chunk: int,
) -> tuple[Tensor, Tensor, Weights, Weights, Weights]:
    """Read tokens into a matrix memory and answer each from the memory that includes it.

    Args:
        query, key, value: [S, H, T, D], T at least 1.
        gates: [S, H, T] each.
        weights, momentum: one [S, H, D, D] each, as they were before the first token.
        chunk: tokens computed at once; changes rounding only.

    Returns:
        answers q_t M_t [S, H, T, D]; errors [S, H, T, D]; M at the start of every chunk
        [S, H, n, D, D]; M and S after the last token.
    """
    state = torch.cat((weights[0], momentum[0]), dim=-2)
    rest = query.shape[2] % chunk  # not divmod: torch.compile cannot trace it for symbolic sizes
    sizes = [size for size in (query.shape[2] - rest, rest) if size]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value, *gates)), strict=True)
    pieces = []
    for size, (q, k, v, *gate) in zip(sizes, parts, strict=True):
        *piece, state = _chunks(q, k, v, Gates(*gate), state, min(chunk, size))
        pieces.append(piece)
    answers, errors, starts = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
    width = key.shape[-1]
    return answers, errors, (starts,), (state[..., :width, :],), (state[..., width:, :],)


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, gates: Gates, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_memory` for a whole number of chunks; ``state`` [S, H, 2 D, D] is M over S."""
    width = key.shape[-1]
    query, key, value = (x.unflatten(2, (-1, chunk)) for x in (query, key, value))
    gates = Gates(*(gate.unflatten(2, (-1, chunk)) for gate in gates))
    kernel = momentum_kernel(gates)
    step = gates.step[..., None, :]

    # errors as a function of the state: E = free - bound state
    coupling = rows_before(kernel.reach) * (key @ key.mT) * step
    reading = _both(key, before(kernel.keep, 1.0), before(kernel.carry, 0.0))
    solved = solve_unit_lower(coupling, torch.cat((value, reading), dim=-1))
    free, bound = solved.split((width, 2 * width), dim=-1)

    # the state after a chunk as a function of the state before: X' = transition X + gain
    writing = _both(
        key * gates.step[..., None], kernel.reach[..., -1, :], kernel.fade_last
    ).mT  # [2 D, b]
    gain = writing @ free
    transition = _decay(kernel.keep, kernel.carry, kernel.decay, width) - writing @ bound

    starts = []
    shape, state = state.shape, state.flatten(0, 1)
    factors, summands = transition.flatten(0, 1).unbind(1), gain.flatten(0, 1).unbind(1)
    for factor, summand in zip(factors, summands, strict=True):
        starts.append(state)
        state = torch.baddbmm(summand, factor, state)
    state = state.unflatten(0, shape[:2])
    at_start = torch.stack(starts, dim=1).unflatten(0, shape[:2])

    errors = free - bound @ at_start
    answers = _both(query, kernel.keep, kernel.carry) @ at_start
    answers = answers + (kernel.reach * (query @ key.mT) * step) @ errors
    return answers.flatten(2, 3), errors.flatten(2, 3), at_start[..., :width, :], state


def _both(rows: Tensor, of_memory: Tensor, of_momentum: Tensor) -> Tensor:
    """``rows`` [..., b, D] times each factor [..., b], side by side: [..., b, 2 D]."""
    return torch.cat((rows * of_memory[..., None], rows * of_momentum[..., None]), dim=-1)


def _decay(keep: Tensor, carry: Tensor, decay: Tensor, width: int) -> Tensor:
    """What becomes of M and S without any step: [..., 2 D, 2 D] out of the last token's factors."""
    last = torch.stack(
        (keep[..., -1], carry[..., -1], torch.zeros_like(decay[..., -1]), decay[..., -1]), dim=-1
    ).unflatten(-1, (2, 2))
    unit = torch.eye(width, dtype=keep.dtype, device=keep.device)
    spread = last[..., :, None, :, None] * unit[:, None, :]  # [..., 2, D, 2, D]
    return spread.flatten(-4, -3).flatten(-2, -1)
