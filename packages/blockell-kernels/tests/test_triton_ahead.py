"""Every kernel compiles for every generation of GPU, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "triton_ahead.py"
ALONE = ("activate_elements", "gradient_tiles", "index_column", "token_square_sums")
"""Kernels that are launched when the one before them has ended."""
SHARED_MEMORY_BYTES = {70: 96 * 1024, 80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", SHARED_MEMORY_BYTES)
def test_kernels_compile(arch, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > 10
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY_BYTES[arch], kernel
        by_descriptors = "descriptors" in kernel["name"] or "packed" in kernel["name"]
        assert bool(kernel["tma"]) == by_descriptors, kernel
        assert kernel["waits"] == (arch == 90 and not kernel["name"].startswith(ALONE)), kernel
        if arch == 90 and "tile 128" in kernel["name"] and "bf16" in kernel["name"]:
            assert kernel["wgmma"], kernel
