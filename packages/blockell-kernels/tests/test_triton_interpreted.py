"""The kernels in Triton's interpreter, where there is no GPU.

The interpreter has to be switched on before triton is imported, so the tests in `gpu/` run in a
process of their own, one per file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "gpu"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py") if "cuda" not in path.name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file):
    if torch.cuda.is_available():
        return  # the folder itself is collected then, on the device
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
