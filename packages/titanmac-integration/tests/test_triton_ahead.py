"""The Triton kernels compile for the GPUs that they are meant for, without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile(architecture: int) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "triton_ahead.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script), str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.rsplit(" ", 1)[1] for line in run.stdout.splitlines()] == ["True"] * 41
