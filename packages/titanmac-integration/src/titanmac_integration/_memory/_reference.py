"""The memory as its formulas say it, token by token, gradients by autograd: for tests and readers.

Titans, section 3.1: S_t = eta_t S_{t-1} - theta_t grad l(M'; x_t), M_t = (1-alpha_t) M_{t-1} + S_t
with l = ||M'(k_t) - v_t||^2. M' is M_{t-1}, or M as it was at the start of the chunk of token t.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ._gates import Gates
from ._mlp import curvature, recall
from ._state import Weights


def reference_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Gates,
    weights: Weights,
    momentum: Weights,
    chunk: int = 1,
) -> tuple[Tensor, Weights, Weights]:
    """Answers M_t(q_t) [S, H, T, D], and M and S after the last token.

    Args:
        query, key, value: [S, H, T, D].
        gates: [S, H, T] each.
        weights, momentum: as for ``linear_memory`` and ``mlp_memory``.
        chunk: tokens whose gradients are taken at the same memory; 1 takes them at M_{t-1}.
    """
    answers = []
    anchor = weights
    for t in range(query.shape[2]):
        if t % chunk == 0:
            anchor = weights
        q, k, v = (x[:, :, t : t + 1] for x in (query, key, value))
        keep, eta, step = (
            gate[:, :, t, None, None]
            for gate in (gates.log_keep.exp(), gates.log_eta.exp(), gates.step)
        )
        if len(anchor) == 2:
            step = step / curvature(functional.silu(k @ anchor[0]), anchor)[..., None]
        theta = step / 2
        with torch.enable_grad():
            at = tuple(
                matrix if matrix.requires_grad else matrix.detach().requires_grad_()
                for matrix in anchor
            )
            loss = (recall(k, at) - v).square().sum()
            gradient = torch.autograd.grad(loss, at, create_graph=True)
        momentum = tuple(eta * s - theta * g for s, g in zip(momentum, gradient, strict=True))
        weights = tuple(keep * m + s for m, s in zip(weights, momentum, strict=True))
        answers.append(recall(q, weights))
    return torch.cat(answers, dim=2), weights, momentum
