"""Importing is lean and never pulls torch in; torch names say what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import blockell_format

CHECK = """
import sys
{body}
print("torch" in sys.modules)
"""
HIDE_TORCH = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Hide())
"""


def run_python(body: str) -> str:
    code = CHECK.format(body=textwrap.dedent(body))
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import blockell_format",
        "import blockell_format.snapshots",
        "from blockell_format import snapshots; snapshots.SnapshotWriter",
        "import blockell_format; dir(blockell_format)",
    ],
)
def test_import_without_torch(statement: str) -> None:
    assert run_python(statement).startswith("False")


def test_the_check_above_can_fail() -> None:
    # touching a torch name imports torch; where torch is missing, a module of that name shows it
    if importlib.util.find_spec("torch"):
        body = "import blockell_format; blockell_format.BlockELLFormat"
    else:
        body = "import types; sys.modules['torch'] = types.ModuleType('torch')"
    assert run_python(body).startswith("True")


def test_import_brings_in_numpy_and_safetensors_only() -> None:
    """What keeps the import quick; benchmarks/bench_format.py times it."""
    body = """
    before = set(sys.modules)
    import blockell_format.snapshots
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    files = {name: str(getattr(sys.modules.get(name), "__file__", "")) for name in new}
    found = {name for name, file in files.items() if "site-packages" in file}
    print(sorted(found - {"blockell_format"}), end=" ")
    """
    assert run_python(body).startswith("['numpy', 'safetensors']")


@pytest.mark.parametrize("name", sorted(blockell_format._TORCH_NAMES))
def test_torch_names_ask_for_the_extra(name: str) -> None:
    body = f"""
    {textwrap.indent(textwrap.dedent(HIDE_TORCH), "    ").strip()}
    try:
        from blockell_format import {name}
    except ImportError as error:
        print(error)
    """
    output = run_python(textwrap.dedent(body))
    assert f"blockell_format.{name} needs torch" in output
    assert 'pip install "blockell-format[torch]"' in output


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blockell_format.nothing


def test_all_names_are_listed() -> None:
    assert set(blockell_format._TORCH_NAMES) < set(blockell_format.__all__)
    assert set(blockell_format.__all__) <= set(dir(blockell_format))


def test_version_is_that_of_the_distribution() -> None:
    try:
        version = importlib.metadata.version("blockell-format")
    except importlib.metadata.PackageNotFoundError:  # run from a plain checkout
        project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
        [version] = re.findall('^version = "(.*)"$', project, re.MULTILINE)
    assert blockell_format.__version__ == version
