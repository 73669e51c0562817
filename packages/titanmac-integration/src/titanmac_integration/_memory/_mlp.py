"""A memory that is an MLP with one hidden layer; gradients are taken at the start of a chunk.

Legend: S batch, H heads, T tokens, b chunk, n chunks, D width, E hidden width. Rows are tokens:
M(k) = silu(k A) B. The inner loss ||M(k) - v||^2 has a gradient of rank one in A and in B, so the
matrices after any token of a chunk need never be formed (Titans, section 3.2; Sun et al. 2024,
"Learning to (Learn at Test Time)", section 2.5, the dual form).
"""

import torch
from torch import Tensor
from torch.nn import functional

from ._gates import Gates, Kernel, momentum_kernel
from ._state import Weights


def mlp_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
    chunk: int,
    offset: int,
) -> tuple[Tensor, Tensor, Weights, Weights, Weights, Weights]:
    """Read tokens into an MLP memory and answer each from the memory that includes it.

    Args:
        query, key, value: [S, H, T, D], T at least 1.
        gates: [S, H, T] each.
        weights, momentum, anchor: [S, H, D, E] and [S, H, E, D] each; ``anchor`` is M at the
            start of the chunk that the first token belongs to.
        chunk: tokens that share the point at which their gradients are taken.
        offset: tokens of the first chunk that were read before.

    Returns:
        answers [S, H, T, D]; errors v - M(k) at the anchor [S, H, T, D]; M at the start of every
        chunk begun here [S, H, n, ...]; M, S and anchor after the last token.
    """
    answers, errors, starts = [], [], []
    sizes = _sizes(query.shape[2], chunk, offset)
    pieces = zip(
        *(x.split(sizes, dim=2) for x in (query, key, value)),
        zip(*(gate.split(sizes, dim=2) for gate in gates), strict=True),
        strict=True,
    )
    for index, (q, k, v, part) in enumerate(pieces):
        if index or not offset:
            anchor = weights
            starts.append(weights)
        answer, error, weights, momentum = _piece(q, k, v, Gates(*part), weights, momentum, anchor)
        answers.append(answer)
        errors.append(error)
    begun = tuple(torch.stack(parts, dim=2) for parts in zip(*starts, strict=True))
    if (offset + query.shape[2]) % chunk == 0:
        anchor = weights
    return torch.cat(answers, dim=2), torch.cat(errors, dim=2), begun, weights, momentum, anchor


def recall(query: Tensor, weights: Weights) -> Tensor:
    """M(q): [..., T, D] by matrices [..., D, E], [..., E, D], or one [..., D, D]."""
    hidden = query @ weights[0]
    return hidden if len(weights) == 1 else functional.silu(hidden) @ weights[1]


def curvature(hidden: Tensor, weights: Weights) -> Tensor:
    """What a token's step is divided by, [S, H, T]: at least its curvature, and at least 1.

    Both matrices together move the answer to key k by at most (|hidden|^2 + slope^2 |B|^2 |k|^2)
    times the step; a step beyond twice the inverse of that diverges. The slope of SiLU is at most
    1.1, |k| is 1, and the largest singular value of B, squared, at most the norm of B^T B.
    """
    spread = torch.linalg.vector_norm(weights[1].mT @ weights[1], dim=(-2, -1))
    return 1.0 + hidden.square().sum(-1) + 1.21 * spread[..., None]


def _piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
) -> tuple[Tensor, Tensor, Weights, Weights]:
    kernel = momentum_kernel(gates)
    before_silu = key @ anchor[0]
    hidden = functional.silu(before_silu)
    error = value - hidden @ anchor[1]
    gate = torch.sigmoid(before_silu)
    slope = gate * (1 + before_silu * (1 - gate))
    step = gates.step / curvature(hidden, anchor)
    # minus half the gradient in A is k^T inner, in B it is hidden^T error
    inner = (error @ anchor[1].mT) * slope

    new: list[Tensor] = []
    fresh: list[Tensor] = []
    rows = query
    for left, right, matrix, speed in (
        (key, inner, weights[0], momentum[0]),
        (hidden, error, weights[1], momentum[1]),
    ):
        out = _read(rows, left, right, step, kernel, matrix, speed)
        rows = functional.silu(out) if not new else out
        stepped = left * step[..., None]
        reach, fade = kernel.reach[..., -1, :, None], kernel.fade_last[..., None]
        keep, carry, decay = (
            x[..., -1, None, None] for x in (kernel.keep, kernel.carry, kernel.decay)
        )
        new.append(keep * matrix + carry * speed + (stepped * reach).mT @ right)
        fresh.append(decay * speed + (stepped * fade).mT @ right)
    return rows, error, tuple(new), tuple(fresh)


def _read(
    rows: Tensor,
    left: Tensor,
    right: Tensor,
    step: Tensor,
    kernel: Kernel,
    matrix: Tensor,
    speed: Tensor,
) -> Tensor:
    """Each row through the matrix as it is after the row's own token."""
    old = kernel.keep[..., None] * (rows @ matrix) + kernel.carry[..., None] * (rows @ speed)
    return old + (kernel.reach * (rows @ left.mT) * step[..., None, :]) @ right


def _sizes(tokens: int, chunk: int, offset: int) -> list[int]:
    """Lengths of the pieces between chunk boundaries: the rest of the first, whole ones, a rest."""
    first = min(tokens, chunk - offset)
    whole, rest = (tokens - first) // chunk, (tokens - first) % chunk
    return [first] + [chunk] * whole + ([rest] if rest else [])
