"""Real processes."""

import subprocess
import sys
from pathlib import Path

from blockell_format.snapshots import open_run


def test_the_example_runs(tmp_path: Path) -> None:
    package = Path(__file__).parents[1]
    if not (package / "pyproject.toml").exists():
        return  # the tests of an installed wheel, which brings no examples
    example = package / "examples" / "train_block_sparse.py"
    assert len(example.read_text().splitlines()) <= 80
    command = [sys.executable, str(example), "--steps", "20", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "swap rate" in done.stdout
    assert open_run(tmp_path / "run").steps[0] == 0
