"""What an import pulls in."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
found = sorted(set({unwanted!r}) & set(sys.modules))
sys.exit(f"imported: {{found}}" if found else 0)
"""


def _run(modules: list[str], unwanted: list[str]) -> subprocess.CompletedProcess[str]:
    code = _CODE.format(modules=modules, unwanted=unwanted)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


COMPUTING = ["torch", "triton", "blockell_kernels", "cms_topology", "titanmac_integration"]


def test_the_app_imports_nothing_that_computes() -> None:
    modules = [
        "blockell_dashboard.views",
        "blockell_dashboard.export",
        "blockell_dashboard.example",
        "blockell_dashboard._server",
    ]
    result = _run(modules, COMPUTING)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["figures", "stats", "io", "export", "example", "cli"])
def test_notebooks_need_no_streamlit(module: str) -> None:
    result = _run([f"blockell_dashboard.{module}"], ["streamlit", *COMPUTING])
    assert result.returncode == 0, result.stderr


def test_this_check_can_fail() -> None:
    result = _run(["blockell_dashboard.views"], ["streamlit"])
    assert result.returncode == 1
    assert "imported: ['streamlit']" in result.stderr
