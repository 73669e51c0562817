"""Every Gluon kernel compiles for Hopper, without one, and keeps its accumulators in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("gluon_ahead.py", "halves_ahead.py")
SHARED_MEMORY_BYTES = 227 * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", SCRIPTS)
def test_kernels_compile(script, tmp_path):
    pytest.importorskip("triton", minversion="3.6")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > 5
    for kernel in kernels:
        assert kernel["shared"] * kernel["per_multiprocessor"] <= SHARED_MEMORY_BYTES, kernel
        assert kernel["wgmma"], kernel
        assert kernel["tma"], kernel
        assert kernel["spilled"] == 0, kernel
