"""A writer killed at any moment leaves a readable run and no half file under a final name."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import Any

from blockell_format.snapshots import open_run

BODY = """
import sys
import numpy as np
from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter, open_run

path, mode = sys.argv[1:]
info = LayerInfo("fc", 64, 40, 20, 16)
columns = np.tile(np.arange(20, dtype=np.int32), (64, 1))
zeros = np.zeros((64, 20), dtype=np.int32)
layer = LayerSnapshot(columns, zeros, zeros.astype(np.float32), zeros > 0, columns)
step = max(open_run(path).steps, default=0) if mode == "resume" else 0
with SnapshotWriter(path, layers=[info], mode=mode) as writer:
    print("ready", flush=True)
    while True:
        step += 1
        writer.log({"loss": 1.0 / step, "text": "x" * 1000}, step)
        writer.write(step, {"fc": layer}, checksums={"fc": ["sum"]}, swap_counts={"fc": 0})
"""


def test_sigkill(run_maker: Any) -> None:
    rng = random.Random(0)
    recorded = 0
    for round_number in range(6):
        mode = "new" if round_number == 0 else "resume"
        command = [sys.executable, "-c", BODY, str(run_maker.path), mode]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.02, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        run = open_run(run_maker.path)
        assert run.verify() == []
        assert run.steps == list(range(1, len(run.steps) + 1))
        assert len(run.steps) >= recorded
        assert len(run.metrics()) >= len(run.steps)
        assert len(run.attempts) == round_number + 1
        assert len(list(run.read_layer("fc"))) == len(run.steps)
        recorded = len(run.steps)
    assert recorded > 6
