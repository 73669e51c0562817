"""How a layer scores its blocks and how freely it may swap them."""

from __future__ import annotations

from dataclasses import dataclass

CANDIDATE_SCORES = ("gradient", "outer", "loss")
KEEP_SCORES = ("gradient", "magnitude", "taylor", "loss")
BIRTHS = ("kaiming", "zeros")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Settings of block scoring, selection and birth. All fields are keyword-only.

    Raises:
        ValueError: a field is outside its range; the message names field, value and rule.
    """

    candidate_score: str = "gradient"
    """Score of absent blocks. "gradient": exact Frobenius norms of the gradient they would get, on
    sampled steps (RigL, Evci et al. 2020, section 3). "outer": error norm times activation norm,
    nearly free; an upper bound that ranks columns alike in every row. "loss": the fall of the loss
    that the block promises, in nats; only together with keep_score="loss"."""

    keep_score: str = "gradient"
    """Score of present blocks. "gradient": moving average of the gradient's Frobenius norm.
    "magnitude": Frobenius norm of the weights. "taylor": moving average of |<W, G>|, the first
    order change of the loss on removal (Molchanov et al. 2019, section 3.1). "loss": the second
    order change of the loss on removal, in nats. Then both scores are in one currency,
    `swap_threshold` means the same at every batch size, and under retention what an old task would
    lose is added to the cost of removal."""

    damping: float = 0.1
    """For the "loss" scores: added to every block's curvature, as a share of the layer's mean
    curvature. > 0."""

    ema_decay: float = 0.95
    """Weight of the past in the moving average; 0.95 averages over about 20 steps. In [0, 1)."""

    swap_threshold: float = 1.5
    """A candidate replaces a present block only if its score exceeds this multiple. >= 1."""

    epsilon: float = 0.05
    """Share of swaps whose newcomer is a random absent column instead of the best. In [0, 1]."""

    max_swap_frac: float = 0.05
    """At most this share of a layer's live blocks is swapped in one decision (rounded down, but
    never below one block of one row group unless it is 0). In [0, 1]."""

    min_swap_frac: float = 0.0
    """Where `swap_threshold` lets less than this share of a layer's live blocks swap (rounded up),
    the largest gains below the threshold are swapped too, and then the smallest losses: the
    topology goes on exploring when the scores promise nothing. In [0, max_swap_frac]."""

    max_row_swap_frac: float = 0.25
    """The same limit within one row, so that no output loses its inputs at once. In [0, 1]."""

    grace_decisions: int = 1
    """A newborn block cannot be dropped at this many decisions after its birth. >= 0."""

    birth: str = "kaiming"
    """Weights of a newborn block. "kaiming": uniform in +-birth_scale/sqrt(fan_in). "zeros": the
    layer's function does not change at birth."""

    birth_scale: float = 0.1
    """Scale of a newborn block's weights relative to a fresh layer's. >= 0."""

    def __post_init__(self) -> None:
        _choice("candidate_score", self.candidate_score, CANDIDATE_SCORES)
        _choice("keep_score", self.keep_score, KEEP_SCORES)
        _choice("birth", self.birth, BIRTHS)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay (={self.ema_decay}) must be in [0, 1).")
        if not self.swap_threshold >= 1.0:
            raise ValueError(
                f"swap_threshold (={self.swap_threshold}) must be at least 1: below it a block "
                "would be replaced by a worse one."
            )
        if (self.candidate_score == "loss") != (self.keep_score == "loss"):
            raise ValueError(
                f"candidate_score (={self.candidate_score!r}) and keep_score "
                f"(={self.keep_score!r}) must both be 'loss' or neither: nats compare only with "
                "nats."
            )
        if not self.damping > 0:
            raise ValueError(f"damping (={self.damping}) must be greater than 0.")
        for name in ("epsilon", "max_swap_frac", "max_row_swap_frac"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} (={value}) must be in [0, 1].")
        if not 0.0 <= self.min_swap_frac <= self.max_swap_frac:
            raise ValueError(
                f"min_swap_frac (={self.min_swap_frac}) must be in [0, max_swap_frac "
                f"(={self.max_swap_frac})]."
            )
        if self.grace_decisions < 0:
            raise ValueError(f"grace_decisions (={self.grace_decisions}) must be 0 or more.")
        if not self.birth_scale >= 0.0:
            raise ValueError(f"birth_scale (={self.birth_scale}) must be 0 or more.")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} (={value!r}) must be one of {', '.join(map(repr, allowed))}.")
