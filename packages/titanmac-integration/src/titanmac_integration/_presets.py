"""What ``--preset`` stands for in the command line: training settings and the task sequence.

The model's shape is ``TitanMACConfig.preset``.
"""

from typing import Any, NamedTuple


class RunPreset(NamedTuple):
    """Defaults of the command line."""

    training: dict[str, Any]
    """Fields of TrainingConfig that differ from its defaults."""
    tasks: tuple[str, ...]
    """Sequence of tasks."""
    steps: tuple[int, ...]
    """Optimizer steps per task."""


RUN_PRESETS = {
    # Sized so that both models together take about three minutes on two CPU cores, and so that
    # every task sees at least eight topology decisions, the last one some steps before its end.
    "demo": RunPreset(
        training={
            "batch_size": 24,
            "seq_len": 64,
            "lr": 3e-3,
            "warmup_steps": 100,
            "level_periods": (1, 10, 50),
            "eval_every": 100,
        },
        tasks=("arithmetic", "prose"),
        steps=(780, 400),
    ),
    "small": RunPreset(
        training={"batch_size": 32, "seq_len": 512, "lr": 1e-3, "warmup_steps": 100},
        tasks=("arithmetic", "prose"),
        steps=(1000, 2000),
    ),
    "titanmac-163m": RunPreset(
        training={"batch_size": 8, "seq_len": 1024, "lr": 3e-4, "warmup_steps": 200},
        tasks=("arithmetic", "prose"),
        steps=(2000, 2000),
    ),
    "titanmac-237m": RunPreset(
        training={"batch_size": 8, "seq_len": 1024, "lr": 3e-4, "warmup_steps": 200},
        tasks=("arithmetic", "prose"),
        steps=(2000, 2000),
    ),
}
