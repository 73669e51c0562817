"""Sizes at which the protocol is run: model, tasks, steps and rates."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._training._config import TrainingConfig

SPARSE: dict[str, Any] = {
    "use_block_sparse": True,
    "block_sparse_layers": None,
    "block_sparse_components": ("mlp", "attention"),
    "block_sparse_density": 0.5,
}


BY_GRADIENT = {
    "block_sparse_min_swap_frac": 0.0,
    "block_sparse_keep_score": "gradient",
    "block_sparse_birth": "kaiming",
}
"""How blocks moved on the first task when everything was measured; not part of a setting's key."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One size of the protocol. All methods share everything in it."""

    name: str
    """Short name."""
    model: dict[str, Any]
    """Fields of TitanMACConfig shared by all architectures."""
    arches: dict[str, dict[str, Any]]
    """Fields of TitanMACConfig per architecture; see ``ARCHES``."""
    training: dict[str, Any]
    """Fields of TrainingConfig shared by all tasks."""
    tasks: tuple[str, ...]
    """Names of the tasks, in order."""
    steps: tuple[int, ...]
    """Optimizer steps per task."""
    lr: tuple[float, ...]
    """Largest learning rate per task."""
    batch_size: tuple[int, ...]
    """Sequences per step, per task."""
    first_swaps: bool = False
    """Whether blocks are swapped while the first task is learned."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Further fields of TitanMACConfig, for all architectures."""
    files: tuple[str, ...] = ()
    """Digest of every task's file, "" for a task without one; none at all if no task has one."""

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch_size"):
            values = getattr(self, name)
            if len(values) == 1:
                object.__setattr__(self, name, values * len(self.tasks))
            elif len(values) != len(self.tasks):
                raise ValueError(
                    f"{name} (={values}) must have one entry per task ({len(self.tasks)}), or one "
                    "for all."
                )
        if len(self.tasks) < 2:
            raise ValueError(f"tasks (={self.tasks}) must be at least two: one to be forgotten.")
        if min(self.steps) < 1:
            raise ValueError(f"steps (={self.steps}) must be positive.")

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        return int(self.training["seq_len"])

    @property
    def key(self) -> str:
        """The name and a digest of all values: cells with equal keys may be compared."""
        values = asdict(self)
        if not self.files:
            del values["files"]  # the keys of records that were made before there was this field
        digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4)
        return f"{self.name}-{digest.hexdigest()}"

    def config(self, arch: str) -> TitanMACConfig:
        """The model of an architecture."""
        return TitanMACConfig.from_dict(
            {**BY_GRADIENT, **self.model, **self.arches[arch], **self.changes}
        )

    def training_config(self, task: int, seed: int, lr: float | None) -> TrainingConfig:
        """Settings of the training on task number ``task``; each phase has its own data order."""
        return TrainingConfig.from_dict(
            {
                **self.training,
                "lr": self.lr[task] if lr is None else lr,
                "batch_size": self.batch_size[task],
                "seed": 1000 * seed + task,
            }
        )

    def changed(self, **values: Any) -> Setting:
        """A copy with some fields replaced, checked again."""
        return replace(self, **values)


def _setting(
    name: str,
    model: dict[str, Any],
    narrow: dict[str, Any],
    training: dict[str, Any],
    *,
    sparse: dict[str, Any] | None = None,
    **values: Any,
) -> Setting:
    half = {**SPARSE, **(sparse or {})}
    spare = {**half, "block_sparse_density": 0.25, "block_sparse_max_density": 0.5}
    arches = {"sparse": half, "spare": spare, "dense": {}, "narrow": narrow}
    common = {"max_seq_len": 128, "window_size": 128, "n_persistent": 0, "tie_weights": False}
    return Setting(
        name=name,
        model={**common, **model},
        arches=arches,
        training={
            "seq_len": 64,
            "beta2": 0.98,
            "warmup_steps": 100,
            "min_lr_frac": 0.1,
            **training,
        },
        **values,
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _setting(
            "demo",
            # Narrower, the sums take up nearly all directions, and little is left for prose.
            {"d_model": 128, "n_heads": 8, "n_layers": 2, "d_ff": 512},
            {"d_model": 108, "n_heads": 6, "d_ff": 432},
            {"level_periods": (1, 10, 50)},
            # Layers this small have few blocks to choose from: their scores lie close together,
            # and attention at half density no longer learns the sums in a minute.
            sparse={
                "block_sparse_components": ("mlp",),
                "block_sparse_row_group": 1,
                "block_sparse_swap_threshold": 1.1,
            },
            first_swaps=True,
            tasks=("arithmetic", "prose"),
            steps=(1200, 400),
            lr=(3e-3,),
            batch_size=(24,),
        ),
        _setting(
            "pilot",
            {"d_model": 256, "n_heads": 8, "n_layers": 4, "d_ff": 1024},
            {"d_model": 184, "n_heads": 4, "d_ff": 736},
            {"grad_clip": 0.0},
            tasks=("arithmetic", "prose"),
            steps=(1500, 3000),
            lr=(2e-3, 3e-3),
            batch_size=(64,),
        ),
        _setting(
            "small",
            {"d_model": 512, "n_heads": 8, "n_layers": 7, "d_ff": 2048},
            {"d_model": 368, "n_heads": 8, "d_ff": 1472},
            {},
            tasks=("arithmetic", "prose"),
            steps=(2000, 3000),
            lr=(1e-3, 2e-3),
            batch_size=(64,),
        ),
    )
}
"""The sizes by name: for a CPU in minutes, the larger pilot (a GPU), and 11 million weights."""
