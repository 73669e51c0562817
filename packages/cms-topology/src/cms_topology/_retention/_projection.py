"""Layers of one shape, projected together.

Legend: L layers, G units of a layer, m rows of a unit, n inputs of a unit, r leading directions U
[n, r] of a unit's inputs with eigenvalues s [r]; the directions beside them share one eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from cms_topology._devices import on
from cms_topology._retention._basis import Eigenbasis
from cms_topology._retention._damping import Damping, per_row
from cms_topology._retention._passes import kernels, reachable
from cms_topology._retention._precision import products
from cms_topology._retention._state import WeightState
from cms_topology._retention._trust_region import drift, shrink
from cms_topology._retention._units import ProtectedWeight, read_all, stacked, write_all


class ProjectionBatch:
    """Keeps the weights of equally shaped layers inside what their memories allow.

    Two controls, either or both: the *update* since the last call is multiplied by
    eps (K + eps I)^-1, and the *displacement* from the anchor is projected onto a budget of drift.

    Args:
        weights: layers of one shape, dtype and device.
        states: what is known of each.
        controls_updates: whether `project` will be given an `eps`.
    """

    def __init__(
        self,
        weights: Sequence[ProtectedWeight],
        states: Sequence[WeightState],
        *,
        controls_updates: bool,
    ) -> None:
        self.weights = list(weights)
        self._columns = [state.columns for state in states]
        self._ranks = [state.basis.rank for state in states]
        self.anchor = torch.stack([state.anchor for state in states])
        """[L, G, m, n]."""
        self.reference = self.anchor
        """[L, G, m, n]; the anchor itself if updates are not controlled."""
        if controls_updates:
            self.reference = torch.stack([state.reference for state in states])
        rank = aligned(max(self._ranks), states[0].anchor)
        bases = [state.basis.padded(rank) for state in states]
        self.vectors = torch.stack([basis.vectors for basis in bases])
        """[L, G, n, r]."""
        values = torch.stack([basis.values for basis in bases])
        rest = torch.stack([basis.rest for basis in bases])
        self.spectrum = torch.cat((values, rest[:, :, None]), 2)
        """float64 [L, G, r + 1]: eigenvalues of the leading directions and of all the others."""
        self.scale = torch.stack([state.scale for state in states])
        """float64 [L]: tr(W K W^T) of the anchor, the unit of relative drift."""
        self.debt = torch.stack([state.debt for state in states])
        self.multiplier = torch.stack([state.multiplier for state in states])
        self.last_drift = torch.zeros_like(self.scale)
        self._complete = min(self._ranks) >= self.vectors.shape[2]
        """No direction is outside of U."""
        self._still = [weight.still() for weight in self.weights]
        self._shares: tuple[float, Tensor, Tensor | None] | None = None
        self._damping: Damping | None = None
        self._exact = all(w.parameter.dtype == self.anchor.dtype for w in self.weights)
        """Weights are written as they were computed, not rounded."""

    def states(self) -> list[WeightState]:
        """What is known of each weight matrix now; views, not copies."""
        same = self.reference is self.anchor
        return [
            WeightState(
                self._columns[i],
                anchor,
                anchor if same else self.reference[i],
                Eigenbasis(self.vectors[i], self.spectrum[i, :, :-1], self.spectrum[i, :, -1]).cut(
                    self._ranks[i]
                ),
                self.scale[i],
                self.debt[i],
                self.multiplier[i],
            )
            for i, anchor in enumerate(self.anchor)
        ]

    @property
    def names(self) -> list[str]:
        return [weight.name for weight in self.weights]

    @property
    def num_bytes(self) -> int:
        """Bytes this batch holds beside the model."""
        held = [self.anchor, self.vectors, self.spectrum]
        if self.reference is not self.anchor:
            held.append(self.reference)
        damping = 0 if self._damping is None else self._damping.num_bytes
        return damping + sum(t.numel() * t.element_size() for t in held)

    def read(self) -> Tensor:
        """[L, G, m, n]."""
        units = torch.empty_like(self.anchor)
        read_all(self.weights, units)
        return units

    @torch.no_grad()
    def project(
        self, eps: float | None, budget: Tensor | float | None, *, narrow: bool = False
    ) -> None:
        """Replace the weights by what the controls leave of them; no host synchronisation.

        With C the displacement's coefficients along U, a control is a factor per direction, and
        what it takes away is added to the weights: they keep every bit where it takes nothing.

        Args:
            eps: None: no control of the update.
            budget: relative drift, a number or 0-d; None: no control of the displacement.
            narrow: the budget is so small that the displacement has to be measured beyond TF32.
        """
        with on(self.anchor.device):  # where kernels are launched
            if eps is None or not self._in_passes(eps, budget, narrow):
                with products(full=True) if narrow else nullcontext():
                    self._by_torch(eps, budget)

    def _by_torch(self, eps: float | None, budget: Tensor | float | None) -> None:
        """`project` anywhere, and the kernels' reference."""
        now = self.read()
        taken: Tensor | None = None
        if eps is None:
            moved = now - self.anchor
            C = kept = self._coefficients(moved)
        else:
            # one product for both: what it reads most of are the directions
            m = now.shape[2]
            both = now.new_empty(*now.shape[:2], 2 * m, now.shape[3])
            moved, update = both[:, :, :m], both[:, :, m:]
            torch.sub(now, self.anchor, out=moved)
            torch.sub(now, self.reference, out=update)
            C, along = self._coefficients(both).split(m, 2)
            # removed share s / (s + eps): a direction without energy stays free for eps = 0 too
            removed = self.spectrum / (self.spectrum + eps).clamp(min=1e-300)
            kept = torch.addcmul(C, along, per_row(removed[:, :, :-1], C), value=-1)
            if not self._complete:
                beside = per_row(removed[:, :, -1:], C)
                taken = update * beside
                moved = moved - taken
                C = torch.addcmul(C, along, beside, value=-1)
        energy = self._energy(kept, C, moved)
        if budget is None:
            removed_along = C - kept
            left = drift(self.spectrum, energy)
        else:
            factor, left = self._within(energy, budget)
            inside, outside = factor[:, :, :-1], factor[:, :, -1:]
            if eps is None:
                removed_along = C * per_row(outside - inside, C)
            else:
                start = C if self._complete else C * per_row(outside, C)
                removed_along = torch.addcmul(start, kept, per_row(inside, C), value=-1)
            if not self._complete:
                now = now + moved * per_row(outside - 1, C)
        self.last_drift.copy_((self.debt + left) / self.scale)
        result = self._minus_back(now if taken is None else now - taken, removed_along)
        self._write(result)
        if eps is not None:
            self.reference = result if self._exact else self.read()

    def _in_passes(self, eps: float, budget: Tensor | float | None, narrow: bool) -> bool:
        """`project` by one pass over memory before, between and after two products each.

        If `narrow`, the displacement's coefficients are exact, by two more products in TF32. What
        is left of it along a direction is then what the budget leaves, however inexact those of
        the update are; what is taken away is small and rounded to nearest, without a bias.

        Returns:
            False where torch has to do it; nothing has happened then.
        """
        weights, by = reachable(self.weights, self._still), kernels()
        if weights is None or by is None or self.reference is self.anchor:
            return False
        more = not self._complete
        shift, outside = self._shares_at(eps)
        anchor, result, vectors = (
            t.flatten(0, 1) for t in (self.anchor, self.reference, self.vectors)
        )
        both, low, all_squares = by.begin(weights, anchor, result, outside, narrow)
        if low is None:
            C = torch.bmm(both, vectors)
        else:
            vectors, low_vectors = by.cut(vectors)
            C = torch.bmm(both, vectors)
            m = result.shape[1]
            C[:, :m].baddbmm_(both[:, :m], low_vectors)
            C[:, :m].baddbmm_(low, vectors)
        kept, inside = by.squares(C, shift, more)
        rest = (all_squares - inside).clamp(min=0) if more else kept.new_zeros(len(kept))
        energy = torch.cat((kept, rest[:, None]), 1).view(self.spectrum.shape)
        factor = None
        if budget is None:
            left = drift(self.spectrum, energy)
        else:
            per_direction, left = self._within(energy, budget)
            factor = per_direction.flatten(0, 1)
            if more:
                by.shrink_outside(both, low, factor, result)
        torch.div(self.debt + left, self.scale, out=self.last_drift)
        result.baddbmm_(by.take(C, shift, factor, more, narrow), vectors.mT, alpha=-1)
        by.end(weights, result)
        return True

    def _shares_at(self, eps: float) -> tuple[Tensor, Tensor | None]:
        """Shares of the update: what is taken outside of the leading directions less what is taken
        along each, [L G, r], and the former, [L G]; None if there is no outside."""
        if self._shares is None or self._shares[0] != eps:  # it seldom changes
            removed = self.spectrum / (self.spectrum + eps).clamp(min=1e-300)
            along, beside = removed[:, :, :-1].flatten(0, 1), removed[:, :, -1:].flatten(0, 1)
            outside = None if self._complete else beside.flatten().to(self.anchor.dtype)
            shift = -along if self._complete else beside - along
            self._shares = eps, shift.to(self.anchor.dtype), outside
        return self._shares[1:]

    def _within(self, energy: Tensor, budget: Tensor | float) -> tuple[Tensor, Tensor]:
        """What a budget leaves along each direction, [L, G, r + 1], and the drift [L] then."""
        # what dropped blocks cost is spent, but a layer is never brought to a complete stop
        allowed = budget * self.scale
        within = torch.maximum(allowed - self.debt, 0.01 * allowed)
        factor, multiplier, left = shrink(self.spectrum, energy, within, self.multiplier)
        self.multiplier.copy_(multiplier)
        return factor, left

    @torch.no_grad()
    def damp_gradients(self, eps: float) -> None:
        """Multiply the gradients by eps (K + eps I)^-1; see `Damping`."""
        if eps == math.inf:
            return
        found = [weight.gradient() for weight in self.weights]
        layers = [i for i, gradient in enumerate(found) if gradient is not None]
        gradients = [gradient for gradient in found if gradient is not None]
        if not gradients:
            return
        units = stacked(gradients, self.anchor)
        if self._damping is None or eps < self._damping.eps:
            self._damping = Damping(self.spectrum, self.vectors, eps)
        damped = self._damping(units, eps, layers if len(layers) < len(found) else None)
        write_all(gradients, damped)

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Relative drift of the weights as they are, float64 [L]."""
        moved = self.read() - self.anchor
        C = self._coefficients(moved)
        return (self.debt + drift(self.spectrum, self._energy(C, C, moved))) / self.scale

    def _write(self, result: Tensor) -> None:
        for weight, units, anchor in zip(self.weights, result, self.anchor, strict=True):
            weight.keep_rows(units, anchor)
        write_all(self.weights, result)

    def _coefficients(self, moved: Tensor) -> Tensor:
        """Along the leading directions: [L, G, m, n] -> [L, G, m, r]."""
        return torch.matmul(moved, self.vectors)

    def _minus_back(self, weights: Tensor, coefficients: Tensor) -> Tensor:
        """The weights less what has these coefficients along the leading directions."""
        flat = (t.flatten(0, 1) for t in (weights, coefficients, self.vectors.mT))
        return torch.baddbmm(*flat, alpha=-1).view(weights.shape)

    def _energy(self, kept: Tensor, C: Tensor, moved: Tensor) -> Tensor:
        """Sum over the rows of the squares along each direction, and of all others together.

        Args:
            kept: coefficients along the leading directions, [L, G, m, r].
            C: what those of `moved` are, which tells how much of it is outside.
            moved: [L, G, m, n].

        Returns:
            float64 [L, G, r + 1].
        """
        along = torch.linalg.vector_norm(kept, dim=2).double().square()
        if self._complete:
            return torch.cat((along, torch.zeros_like(along[:, :, :1])), 2)
        inside = torch.linalg.vector_norm(C, dim=(2, 3)).double().square()
        outside = torch.linalg.vector_norm(moved, dim=(2, 3)).double().square() - inside
        return torch.cat((along, outside.clamp(min=0)[:, :, None]), 2)


def aligned(rank: int, weights: Tensor) -> int:
    """More directions, if that makes products with them faster, but no more than inputs.

    On a GPU rows of matrices that begin at odd addresses take three times as long.
    """
    return min(-(-rank // 8) * 8, weights.shape[2]) if weights.is_cuda else rank
