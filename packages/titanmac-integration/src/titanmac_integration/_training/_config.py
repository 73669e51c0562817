"""Settings of a training run."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titanmac_integration._config._config import TitanMACConfig

OPTIMIZERS = ("adamw", "nested")
PRECISIONS = ("fp32", "bf16", "fp16")
FREE_FIELDS = (
    "accumulation_steps",
    "compile",
    "cuda_graph",
    "eval_every",
    "eval_max_frac",
    "log_every",
    "max_nonfinite",
)
"""Fields that a resumed run may change: they do not change what is learned, except for rounding."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained; every field is checked on construction (``ValueError``)."""

    batch_size: int = 32
    """Sequences per optimizer step."""
    seq_len: int = 128
    """Longest training sequence in tokens; the model's max_seq_len must be at least this."""
    optimizer: str = "adamw"
    """"adamw", or "nested": DeepNestedOptimizer, which the next three fields belong to."""
    cms_levels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Patterns of parameter names and the slow level (1 or 2) that those change at."""
    deep_momentum: bool = False
    """Whether a network takes the place of AdamW's moving average."""
    lr_controller: bool = False
    """Whether a learned factor scales the learning rate of every group."""
    lr: float = 1e-3
    """Largest learning rate: reached after the warmup, then lowered along a cosine."""
    min_lr_frac: float = 0.05
    """Learning rate at the end of the cosine, as a share of ``lr``."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    accumulation_steps: int = 1
    """Parts in which a batch is worked on one after another, to save memory."""
    precision: str = "fp32"
    """"fp32", "bf16" or "fp16" (with loss scaling): what autocast computes products in."""
    compile: bool = False
    """Whether torch.compile compiles the model."""
    cuda_graph: bool = False
    """Whether steps are replayed from CUDA graphs: on a GPU, in one process, in fp32 or bf16.

    ``titanmac train`` does so wherever it can, unless told otherwise.
    """
    level_periods: tuple[int, int, int] = (1, 10, 100)
    """Optimizer steps between accumulating, folding and deciding on the topology."""
    decide_until: float = 1.0
    """Share of a task's steps after which blocks stand still, so that the last can still learn."""
    eval_every: int = 0
    """Steps between evaluations during training; 0 evaluates at the end of each task only."""
    eval_max_frac: float = 0.25
    """Evaluations during training are left out where they would exceed this share of the time."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    max_nonfinite: int = 10
    """Training stops with an error after this many batches in a row without a finite loss."""
    seed: int = 0
    """Source of initial weights, topology, data order and decisions."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("batch_size", 1),
            ("seq_len", 2),
            ("warmup_steps", 0),
            ("accumulation_steps", 1),
            ("eval_every", 0),
            ("log_every", 1),
            ("max_nonfinite", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} (={value!r}) must be an integer of at least {minimum}.")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed (={self.seed}) must be below 2**64.")
        for name, rule, holds in (
            ("lr", "above 0", lambda v: v > 0),
            ("min_lr_frac", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("weight_decay", "0 or more", lambda v: v >= 0),
            ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
            ("beta2", "in [0, 1)", lambda v: 0 <= v < 1),
            ("grad_clip", "0 (off) or more", lambda v: v >= 0),
            ("decide_until", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("eval_max_frac", "in (0, 1]", lambda v: 0 < v <= 1),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not holds(value):
                raise ValueError(f"{name} (={value!r}) must be a number {rule}.")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision (={self.precision!r}) must be one of {', '.join(PRECISIONS)}."
            )
        for name in ("compile", "cuda_graph", "deep_momentum", "lr_controller"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be True or False.")
        if self.cuda_graph and self.precision == "fp16":
            raise ValueError(
                "cuda_graph (=True) cannot hold the loss scaling of precision (='fp16'); use "
                "precision='bf16', or switch cuda_graph off."
            )
        self._check_optimizer()
        if self.accumulation_steps > self.batch_size:
            raise ValueError(
                f"accumulation_steps (={self.accumulation_steps}) must be at most batch_size "
                f"(={self.batch_size}): every part needs a sequence."
            )
        self._check_periods()

    def _check_optimizer(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer (={self.optimizer!r}) must be one of {', '.join(OPTIMIZERS)}."
            )
        if not isinstance(self.cms_levels, Mapping):
            raise ValueError(
                f"cms_levels (={self.cms_levels!r}) must map patterns to levels, for example "
                '{"blocks.*.mlp.*": 1}.'
            )
        object.__setattr__(self, "cms_levels", dict(self.cms_levels))
        for name in ("cms_levels", "deep_momentum", "lr_controller"):
            if getattr(self, name) and self.optimizer != "nested":
                raise ValueError(
                    f"{name} (={getattr(self, name)!r}) needs optimizer='nested', but it is "
                    f"{self.optimizer!r}."
                )

    def _check_periods(self) -> None:
        periods = self.level_periods
        valid = (
            isinstance(periods, (list, tuple))
            and len(periods) == 3
            and all(isinstance(p, int) and not isinstance(p, bool) and p >= 1 for p in periods)
            and periods[0] == 1
            and periods[1] % periods[0] == 0
            and periods[2] % periods[1] == 0
        )
        if not valid:
            raise ValueError(
                f"level_periods (={periods!r}) must be three integers: 1, then a multiple of "
                "it, then a multiple of that, for example (1, 10, 100)."
            )
        object.__setattr__(self, "level_periods", tuple(periods))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """The inverse of :meth:`to_dict`; unknown names raise ``ValueError``."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"training settings (={', '.join(map(repr, unknown))}) must be fields of "
                f"TrainingConfig; known: {', '.join(sorted(known))}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return {**dataclasses.asdict(self), "level_periods": list(self.level_periods)}

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def check_fits(self, model: TitanMACConfig) -> None:
        """Raise ``ValueError`` if ``model`` cannot be trained with these settings."""
        if self.seq_len > model.max_seq_len:
            raise ValueError(
                f"seq_len (={self.seq_len}) must not exceed the model's max_seq_len "
                f"(={model.max_seq_len}); lower the one or raise the other."
            )
        if self.cuda_graph and model.activation_checkpointing and model.dropout > 0:
            raise ValueError(
                f"cuda_graph (=True) cannot hold the model's dropout (={model.dropout}) together "
                "with activation_checkpointing (=True), which draws it again; switch one off."
            )

    def lr_at(self, step: int, steps: int, *, peak: float | None = None) -> float:
        """Learning rate of ``step`` (from 0) out of ``steps``: linear warmup, then cosine.

        ``peak`` replaces ``lr`` as the largest rate.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return (
            (self.lr if peak is None else peak)
            * warmup
            * (self.min_lr_frac + (1.0 - self.min_lr_frac) * cosine)
        )
