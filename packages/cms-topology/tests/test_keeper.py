"""A disk that is full for a while costs snapshots and metrics, not the training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from blockell_format.snapshots import SnapshotWriter, open_run
from cms_topology import CMSBlockLinear, RecordKeeper, ScoringConfig, TopologyManager

SCORING = ScoringConfig(max_swap_frac=0.2, max_row_swap_frac=0.5, swap_threshold=1.0)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow: writing fails as on a full disk, for any user."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Training:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            CMSBlockLinear(32, 64, tile_size=8, row_group=1, scoring=SCORING)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.manager = TopologyManager(self.model, self.optimizer, periods=(1, 2, 4))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.model(x) - x.repeat(1, 2).cos()).square().mean().backward()
            self.optimizer.step()
            self.manager.step()


def test_an_outage_costs_records_only(tmp_path: Path) -> None:
    plain, recorded = Training(), Training()
    plain.steps(1, 24)
    with SnapshotWriter(tmp_path / "run", layers=recorded.manager.layer_table()) as writer:
        recorded.manager.writer = recorded.manager.logger = writer
        recorded.steps(1, 4)
        for first in (5, 17):  # two outages of two decisions each
            with full_disk(), pytest.warns(UserWarning, match="could not be written") as caught:
                recorded.steps(first, first + 7)
            said = [str(warning.message) for warning in caught]
            for what, text in zip(("metrics", "snapshot"), said, strict=True):
                assert text.startswith(f"the topology's {what} of step {first + 3} could not be")
                assert "File too large" in text
                assert "training goes on without. Free space or mend the directory" in text
            if first == 5:
                recorded.steps(13, 16)
    run = open_run(tmp_path / "run")
    assert run.steps == [4, 16]
    assert [line["step"] for line in run.metrics()] == [4, 16]
    for name, tensor in plain.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, recorded.model.state_dict()[name]), name


def test_mistakes_are_no_outages(tmp_path: Path) -> None:
    training = Training()
    with SnapshotWriter(tmp_path / "run", layers=training.manager.layer_table()) as writer:
        training.manager.writer = writer
        training.steps(1, 4)
        with pytest.raises(FileExistsError, match=r"step \(=4\) was already recorded"):
            training.manager.write_snapshot()
        again = TopologyManager(training.model, None, periods=(1, 2, 4), writer=writer)
        training.manager = again
        with pytest.raises(FileExistsError, match=r"step \(=4\) was already recorded"):
            training.steps(5, 8)


def test_other_errors_and_success_say_nothing() -> None:
    keeper = RecordKeeper()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), keeper.writing("it", 1):
            raise KeyError("a mistake")
        with keeper.writing("it", 1):
            pass
