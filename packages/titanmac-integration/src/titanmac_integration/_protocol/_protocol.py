"""The whole protocol: methods times dials times seeds, resumable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from titanmac_integration._model._checkpoint import write_json
from titanmac_integration._model._titanmac import create_titanmac_model

from ._cell import Start, learn_first, run_cell
from ._methods import Asked
from ._recording import Recording
from ._records import SUMMARY_FILE, append_record, read_records, record_id
from ._score import RetentionTask
from ._settings import Setting
from ._summary import summarise
from ._tasks import make_retention_task

CHECKPOINTS_DIR = "first-task"


class Protocol:
    """Runs cells that are not in a directory yet, and writes the summary.

    The model after the first task is trained once per architecture and seed and kept in the
    directory. Several processes may share a directory as long as they differ in their seeds.

    Args:
        setting: model, tasks, steps.
        directory: receives ``retention.jsonl`` (a line per finished cell), ``retention.json`` (the
            summary), and with ``record`` a run for the dashboard.
        device: where to train.
        record: whether the first cell asked for is recorded, metrics, snapshots and model.
        progress: whether progress bars are shown.
        report: called with every finished record.

    Raises:
        ValueError: a task that cannot be made, or that does not fit into the setting's sequences.
        OSError: a file that cannot be read.
    """

    def __init__(
        self,
        setting: Setting,
        directory: Path,
        *,
        device: torch.device | str = "cpu",
        record: bool = False,
        progress: bool = False,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.setting, self.directory = setting, directory
        self.device = torch.device(device)
        self.record, self.progress, self.report = record, progress, report
        self.tasks: list[RetentionTask] = [
            make_retention_task(name, seq_len=setting.seq_len) for name in setting.tasks
        ]
        for task in self.tasks:  # refuses what does not fit before anything is trained
            task.batch(1, setting.seq_len, torch.Generator())

    def run(
        self, asked: Sequence[Asked], seeds: Sequence[int], *, time_limit_s: float | None = None
    ) -> bool:
        """Run what is missing of the cells asked for.

        Args:
            asked: methods with architecture and dial.
            seeds: seeds, in order.
            time_limit_s: no cell is begun that would probably not end within these seconds.

        Returns:
            Whether everything asked for is there now.
        """
        started = time.perf_counter()
        longest = 0.0
        recorded = (asked[0], seeds[0]) if self.record else None
        try:
            for seed in seeds:
                for cells in self._missing(asked, seed):
                    fresh: Start | None = None
                    for cell in cells:
                        began = time.perf_counter()
                        late = began - started + longest
                        if time_limit_s is not None and late > time_limit_s:
                            return False
                        with self._recording(cell, seed, recorded) as recording:
                            if fresh is None:
                                fresh = self._start(cell.arch, seed, recording)
                                began = time.perf_counter()
                            self._cell(cell, fresh, recording)
                        longest = max(longest, time.perf_counter() - began)
        finally:
            self.write_summary()
        return True

    def write_summary(self) -> None:
        """Write ``retention.json`` from the lines there are."""
        records = read_records([self.directory])
        if records:
            write_json(self.directory / SUMMARY_FILE, summarise(records))

    def _missing(self, asked: Sequence[Asked], seed: int) -> list[list[Asked]]:
        """Cells to run, by architecture, in the order asked for."""
        done = {record["id"] for record in read_records([self.directory])}
        by_arch: dict[str, list[Asked]] = {}
        for cell in asked:
            if record_id(self.setting.key, cell, seed) not in done:
                by_arch.setdefault(cell.arch, []).append(cell)
        return list(by_arch.values())

    def _start(self, arch: str, seed: int, recording: Recording | None) -> Start:
        name = f"{self.setting.key}-{arch}-{seed}.safetensors"
        return learn_first(
            self.setting,
            self.tasks,
            arch,
            seed,
            self.device,
            self.directory / CHECKPOINTS_DIR / name,
            progress=self.progress,
            recording=recording,
        )

    def _cell(self, cell: Asked, start: Start, recording: Recording | None) -> None:
        record = run_cell(
            self.setting,
            self.tasks,
            cell,
            start,
            self.device,
            progress=self.progress,
            recording=recording,
        )
        append_record(self.directory, record)
        self.report(record)

    @contextlib.contextmanager
    def _recording(
        self, cell: Asked, seed: int, recorded: tuple[Asked, int] | None
    ) -> Iterator[Recording | None]:
        if (cell, seed) != recorded:
            yield None
            return
        config = self.setting.config(cell.arch)
        model = create_titanmac_model(config, device="meta")
        about = {
            "command": "continual",
            "method": cell.method,
            "seed": seed,
            "tasks": [task.name for task in self.tasks],
            "steps": list(self.setting.steps),
            "model": config.to_dict(),
        }
        with Recording(self.directory, model, about) as recording:
            yield recording


def run_protocol(
    setting: Setting,
    asked: Sequence[Asked],
    seeds: Sequence[int],
    directory: Path,
    *,
    time_limit_s: float | None = None,
    **options: Any,
) -> bool:
    """``Protocol(setting, directory, **options).run(asked, seeds)``."""
    protocol = Protocol(setting, directory, **options)
    return protocol.run(asked, seeds, time_limit_s=time_limit_s)
