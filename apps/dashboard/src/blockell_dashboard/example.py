"""A made-up run, for trying the dashboard without training anything.

The numbers are invented: they only behave roughly like those of a training run. R block rows,
C block columns, K slots per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from blockell_format import topology_checksum
from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter

__all__ = ["EXAMPLE_LAYERS", "write_example_run"]

EXAMPLE_LAYERS = tuple(
    LayerInfo(f"blocks.{block}.mlp.{part}", R=R, C=C, K=C // 2, B=16)
    for block in range(4)
    for part, R, C in (("fc1", 64, 24), ("fc2", 24, 64))
)
"""Two layers of different shape in each of four transformer blocks, half dense."""


def write_example_run(
    run_dir: str | Path,
    *,
    layers: tuple[LayerInfo, ...] = EXAMPLE_LAYERS,
    decisions: int = 40,
    period: int = 25,
    live: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Path:
    """Write a run directory with invented topology decisions and a loss.

    Args:
        run_dir: must not hold a run yet.
        layers: the layer table.
        decisions: snapshots to write.
        period: steps between decisions; the loss is logged five times in between.
        live: live blocks per row of the layers named here; the other slots stay spare.
        seed: of everything.

    Returns:
        `run_dir` as a path.
    """
    rng = np.random.default_rng(seed)
    live = live or {}
    states = {info.name: _start(info, live.get(info.name, info.K), rng) for info in layers}
    with SnapshotWriter(
        run_dir, layers=layers, config={"made_up": True, "seed": seed}, run_id="example"
    ) as writer:
        for decision in range(decisions):
            step = decision * period
            rate = 0.02 + 0.07 * np.exp(-decision / 12) + 0.005 * rng.standard_normal()
            rate = 0.16 if decision == decisions * 3 // 5 else max(rate, 0.004)
            for info in layers:
                _decide(states[info.name], info, rate if decision else 0.0, period, rng)
            writer.write(
                step,
                states,
                checksums={
                    name: [topology_checksum(state.col_indices, state.block_age_steps)]
                    for name, state in states.items()
                },
                swap_counts={name: int(state.swapped.sum()) for name, state in states.items()},
            )
            for at in range(step, step + period, max(1, period // 5)):
                noise = 0.04 * rng.standard_normal()
                loss = 1.2 + 3.0 * np.exp(-at / (period * decisions / 6)) + noise
                writer.log({"loss": loss, "learning_rate": 1e-3, "tokens_per_s": 9000 + at}, at)
    return Path(run_dir)


def _start(info: LayerInfo, live: int, rng: np.random.Generator) -> LayerSnapshot:
    order = np.argsort(rng.random((info.R, info.C)), axis=1)[:, : info.K].astype(np.int32)
    order[:, live:] = -1
    return LayerSnapshot(
        col_indices=order,
        block_age_steps=np.zeros((info.R, info.K), dtype=np.int32),
        block_score=rng.lognormal(-2.0, 0.5, (info.R, info.K)).astype(np.float32),
        swapped=np.zeros((info.R, info.K), dtype=bool),
        previous_columns=order.copy(),
    )


def _decide(
    state: LayerSnapshot, info: LayerInfo, rate: float, period: int, rng: np.random.Generator
) -> None:
    """Age every block, then replace a share of them, mostly those of low score."""
    columns, live = state.col_indices, state.col_indices >= 0
    state.previous_columns = columns.copy()
    state.swapped = np.zeros_like(live)
    if rate > 0:
        state.block_age_steps = state.block_age_steps + np.where(live, period, 0).astype(np.int32)
        drift = np.exp(0.15 * rng.standard_normal(live.shape))
        state.block_score = (state.block_score * drift).astype(np.float32)
    wish = state.block_score * rng.lognormal(0, 0.8, live.shape)
    wish[~live] = np.inf
    for at in np.argsort(wish, axis=None)[: int(rate * live.sum())]:
        row, slot = divmod(int(at), info.K)
        free = np.setdiff1d(np.arange(info.C), columns[row])
        if free.size == 0:
            continue
        # Low columns attract more blocks, so that the column entropy falls slowly.
        weights = 1.0 / (4 + free)
        columns[row, slot] = rng.choice(free, p=weights / weights.sum())
        state.block_age_steps[row, slot] = 0
        state.block_score[row, slot] = rng.lognormal(-2.0, 0.5)
        state.swapped[row, slot] = True
