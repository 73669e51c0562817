"""Scores of present and absent blocks on one scale.

Legend: R block rows, C block columns, K slots per row, B tile side; G_rc the gradient block (r, c)
gets, or would get if it were present.

State comes in two kinds. What is equal on every rank by construction (gradients are averaged by
DDP) lives in buffers. What is a rank's own (sums over its tokens) must be out of reach of DDP's
broadcast of buffers, which would overwrite it at the next forward: it lives in plain tensors that
travel in `state_dict` through `get_extra_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology._averages import update_averages
from cms_topology._blocks import all_finite, block_norms
from cms_topology._config import ScoringConfig
from cms_topology._loss_score import LossStatistics
from cms_topology._sampled import add_sampled_step, fold_sampled_steps
from cms_topology._scores import (
    HISTORY_DECISIONS,
    calibrated,
    record_swaps,
    select_swaps,
    swap_rates,
)
from cms_topology._selection import Selection

_DTYPES = {
    "block_age": torch.int32,
    "block_grace": torch.int32,
    "num_decisions": torch.int64,
}
"""Of buffers that are not float32."""


def compute_gradient_frobenius_norms(grad: Tensor) -> Tensor:
    """Frobenius norm of every block's gradient: [R, K, B, B] -> float32 [R, K]."""
    return block_norms([grad])[0]


def compute_column_entropy(col_indices: Tensor, C: int) -> Tensor:
    """Entropy of column usage over log C, in [0, 1], as a 0-d tensor on the indices' device.

    Spare slots (-1) do not count. C = 1 gives 1.
    """
    if C == 1:
        return torch.ones((), dtype=torch.float32, device=col_indices.device)
    flat = col_indices.flatten().long()
    live = (flat >= 0).float()
    usage = live.new_zeros(C).scatter_add_(0, flat.clamp(min=0), live)
    p = usage / usage.sum()
    return torch.special.entr(p).sum() / math.log(C)


class TopologyScorer(nn.Module):
    """Keeps the scores, ages and statistics of one layer's blocks and selects swaps.

    Args:
        R, C, K, B: block rows, block columns, slots per row, tile side.
        config: thresholds, caps and kinds of score.
        device: where the state lives.

    Buffers: `score_ema`, `score_weight` float32 [R, K] (moving average and its bias correction
    1 - decay^t), `block_age` int32 [R, K] in optimizer steps since birth, `block_grace` int32
    [R, K] in decisions, `num_decisions` int64, `swap_history` float32 (a ring of swap rates).
    """

    score_ema: Tensor
    score_weight: Tensor
    block_age: Tensor
    block_grace: Tensor
    num_decisions: Tensor
    swap_history: Tensor

    def __init__(
        self,
        R: int,
        C: int,
        K: int,
        B: int,
        config: ScoringConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, ScoringConfig):
            raise ValueError(f"scoring (={type(config).__name__}) must be a ScoringConfig.")
        self.R, self.C, self.K, self.B = R, C, K, B
        self.config = config if config is not None else ScoringConfig()
        real: dict[str, Any] = {"dtype": torch.float32, "device": device}  # whatever the default is
        self.register_buffer("score_ema", torch.zeros(R, K, **real))
        self.register_buffer("score_weight", torch.zeros(R, K, **real))
        self.register_buffer("block_age", torch.zeros(R, K, dtype=torch.int32, device=device))
        self.register_buffer("block_grace", torch.zeros(R, K, dtype=torch.int32, device=device))
        self.register_buffer("num_decisions", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("swap_history", torch.zeros(HISTORY_DECISIONS, **real))
        size = R + C + R * C + 1
        # sums over the sampled steps since the last fold, and their means after it; layout:
        # error norms [R], activation norms [C], candidate norms [R * C], number of sampled steps
        self._sums = torch.zeros(size, **real)
        self._means = torch.zeros(size, **real)
        self._unfolded = False  # whether anything was added since the last fold
        self.loss: LossStatistics | None = None
        """Statistics of the scores in nats; None for others."""
        if self.config.candidate_score == "loss":
            self.loss = LossStatistics(R, C, B, device)

    # -- collecting ---------------------------------------------------------------------------

    def initialize_scores(self) -> None:
        """Forget everything: scores, ages, statistics, history."""
        for buffer in self.buffers():
            buffer.zero_()
        self._sums.zero_()
        self._means.zero_()
        self._unfolded = False
        if self.loss is not None:
            self.loss.sums.zero_()
            self.loss.means.zero_()

    def update_gradient_ema(self, norms: Tensor, finite: Tensor | None = None) -> None:
        """Fold one optimizer step's block scores into the moving average and age the blocks.

        `ema = decay * ema + (1 - decay) * norms`, with the bias correction 1 - decay^t kept per
        block (a newborn starts its own).

        Args:
            norms: float32 [R, K].
            finite: 0-d bool; False skips the step. Default: whether `norms` is finite everywhere.
        """
        update_averages([self], [norms], all_finite([norms]) if finite is None else finite)

    def accumulate_statistics(self, stats: Tensor, finite: Tensor | None = None) -> None:
        """Add one step's squared norms [R + C + R * C] (rows, columns, all blocks)."""
        if finite is None:
            finite = stats.isfinite().all()
        add_sampled_step([self], [stats], finite)

    def fold(self) -> None:
        """Turn the sums since the last fold into means; with no sample since, keep the old ones."""
        fold_sampled_steps([self])

    # -- scores -------------------------------------------------------------------------------

    @property
    def error_norm(self) -> Tensor:
        """float32 [R]: norm of the output gradient per block row, mean of the sampled steps."""
        return self._means[: self.R]

    @property
    def activation_norm(self) -> Tensor:
        """float32 [C]: norm of the input per block column, mean of the sampled steps."""
        return self._means[self.R : self.R + self.C]

    @property
    def candidate_norm(self) -> Tensor:
        """float32 [R, C]: ||G_rc||_F of all positions, mean of the sampled steps."""
        return self._means[self.R + self.C : -1].view(self.R, self.C)

    @property
    def num_samples(self) -> Tensor:
        """0-d float32: steps behind the means."""
        return self._means[-1]

    def present_scores(self, values: Tensor, col_indices: Tensor | None = None) -> Tensor:
        """Keep scores of all slots, float32 [R, K]; not a number where nothing was measured yet.

        Args:
            values: [R, K, B, B].
            col_indices: int32 [R, K]; only the scores in nats need them.
        """
        if self.loss is not None:
            assert col_indices is not None
            size_sq = compute_gradient_frobenius_norms(values).square()
            slope = self.score_ema / self.score_weight
            columns = col_indices.clamp(min=0)
            return self.loss.cost(slope, size_sq, columns, self.config.damping)
        if self.config.keep_score == "magnitude":
            return compute_gradient_frobenius_norms(values)
        return self.score_ema / self.score_weight

    def compute_candidate_scores(self) -> Tensor:
        """Scores of all positions before calibration, float32 [R, C].

        "outer": error_norm[r] * activation_norm[c], an upper bound of ||G_rc||_F by
        Cauchy-Schwarz, typically far too large. "gradient": the norms themselves. "loss": gains in
        nats.
        """
        if self.loss is not None:
            return self.loss.gain(self.config.damping)
        if self.config.candidate_score == "outer":
            return torch.outer(self.error_norm, self.activation_norm)
        return self.candidate_norm

    def calibrate(self, candidates: Tensor, present: Tensor, col_indices: Tensor) -> Tensor:
        """Scale candidates so that on the present blocks, where both are known, sums agree.

        The ratio also cancels a loss scale, the number of tokens and the number of micro-batches,
        and turns gradient norms into the unit of the keep score, so that `swap_threshold` means the
        same for all of them.

        Args:
            candidates: float32 [R, C].
            present: float32 [R, k], keep scores of the first k slots.
            col_indices: int32 [R, k].
        """
        return calibrated(candidates[None], present[None], col_indices[None])[0]

    def should_swap(self, candidate: Tensor, present: Tensor) -> Tensor:
        """Elementwise: does the candidate beat the present block by the threshold, strictly?"""
        won = candidate > self.config.swap_threshold * present
        return won & candidate.isfinite() & present.isfinite()

    def select_top_k(
        self,
        values: Tensor,
        col_indices: Tensor,
        *,
        row_group: int = 1,
        generator: torch.Generator | None = None,
        locked: Tensor | None = None,
        cost: Tensor | None = None,
    ) -> tuple[Selection, Tensor]:
        """Swaps of one decision and the calibrated candidate scores [R, C] behind them.

        Args:
            values: [R, K, B, B], all slots.
            col_indices: int32 [R, k], the live slots.
            row_group: rows that share their columns.
            generator: source of the exploration.
            locked: bool [R, k], blocks that must stay.
            cost: float32 [R, k], what dropping a block costs an old task, in nats.
        """
        found, candidates = select_swaps(
            [self],
            [values],
            col_indices[None],
            row_group=row_group,
            generators=[generator],
            locked=None if locked is None else locked[None],
            cost=None if cost is None else cost[None],
        )
        return Selection(found.swapped[0], found.columns[0], found.max_swaps), candidates[0]

    # -- the life of a block ------------------------------------------------------------------

    def record_decision(self, swapped: Tensor, newborn_scores: Tensor) -> None:
        """Start the newborns' lives and write the swap rate into the history.

        Args:
            swapped: bool [R, k].
            newborn_scores: float32 [R, k], candidate scores of the slots' columns.
        """
        record_swaps([self], swapped[None], newborn_scores[None])

    def swap_rates(self) -> list[float]:
        """Swap rates of the last decisions (at most 64), oldest first. Copies to the host."""
        return swap_rates([self])[0]

    # -- torch's protocols --------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """A rank's own statistics as one float64 tensor (float32 values, held exactly)."""
        parts = [self._sums, self._means]
        if self.loss is not None:
            parts += [self.loss.sums, self.loss.means]
        state = torch.cat(parts).double()
        return state if state.is_meta else state.cpu()

    def set_extra_state(self, state: Tensor) -> None:
        sizes = [self._sums.numel()] * 2
        if self.loss is not None:
            sizes += [self.loss.sums.numel()] * 2
        expected = sum(sizes)
        if not isinstance(state, Tensor) or state.numel() != expected:
            found = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"extra state (={found}) must be a tensor of {expected} elements for a layer with "
                f"R={self.R}, C={self.C}, candidate_score={self.config.candidate_score!r}; the "
                "checkpoint belongs to another configuration."
            )
        # where the buffers are or, if they are loaded into an empty model after this, will be
        home = state.device if self.score_ema.is_meta else self.score_ema.device
        given = state.to(home, self._sums.dtype)
        parts = [part.clone() for part in torch.split(given, sizes)]
        self._sums, self._means = parts[:2]
        self._unfolded = True
        if self.loss is not None:
            self.loss.sums, self.loss.means = parts[2:]

    def follow_buffers(self) -> None:
        """Take a rank's own statistics to where buffers were put one by one; empty ones to zero.

        Buffers that came in another dtype, as from a file that was cast to half, get theirs back.
        """
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(_DTYPES.get(name, torch.float32))
        home = self.score_ema.device
        if self._sums.device == home:
            return

        def taken(own: Tensor) -> Tensor:
            return torch.zeros_like(own, device=home) if own.is_meta else own.to(home)

        self._sums, self._means = taken(self._sums), taken(self._means)
        if self.loss is not None:
            self.loss.sums, self.loss.means = taken(self.loss.sums), taken(self.loss.means)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopologyScorer:
        """Follow the module to another device, but keep float32 when it is cast to bf16 or half."""
        originals: dict[str, Tensor] = dict(self._buffers)  # type: ignore[arg-type]
        super()._apply(fn, recurse)
        for name, original in originals.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        for name in ("_sums", "_means"):
            original = getattr(self, name)
            moved = fn(original)
            keep = moved.dtype == original.dtype
            setattr(self, name, moved if keep else original.to(moved.device))
        if self.loss is not None:
            self.loss.sums = self.loss.sums.to(self._sums.device)
            self.loss.means = self.loss.means.to(self._sums.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"candidate_score={self.config.candidate_score!r}, "
            f"keep_score={self.config.keep_score!r}"
        )
