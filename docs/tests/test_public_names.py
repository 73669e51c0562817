"""Public names are documented, in a docstring and on a page; what a package imports it declares."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "blockell_format": "blockell-format",
    "blockell_kernels": "blockell-kernels",
    "cms_topology": "cms-topology",
    "titanmac_integration": "titanmac-integration",
    "blockell_dashboard": "blockell-dashboard",
}
MODULES = [
    *(name for name in PACKAGES if name != "blockell_dashboard"),  # that one is a command
    "blockell_format.snapshots",
    "blockell_kernels.tune",
    "titanmac_integration.callbacks",
]
# asked for where they are used, by a message that names them
ASKED_FOR = {"pytorch_lightning", "sklearn"}


def listed() -> set[str]:
    """Words in code on the page of all names."""
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    return {word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module: str) -> None:
    package = importlib.import_module(module)
    assert sorted(set(package.__all__) - listed()) == [], "add them to docs/reference.md"
    for name in package.__all__:
        try:
            value = getattr(package, name)
        except ImportError:
            continue  # it belongs to an extra
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def imported(source: str) -> set[str]:
    """Top-level names of all absolute imports, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(sources: list[str], declared: set[str]) -> list[str]:
    """Imported distributions beyond `declared`; one that is not installed goes by its import."""
    installed = packages_distributions()
    return sorted(
        name
        for name in set().union(*map(imported, sources))
        if not {normal(dist) for dist in installed.get(name, [name])} & declared
    )


def declared_by(distribution: str) -> set[str]:
    """What it and those of ours that it needs declare, extras included."""
    lines = requires(distribution) or []
    names = {normal(re.split(r"[^\w.-]", line)[0]) for line in lines}
    ours = names & set(PACKAGES.values())
    return names.union({distribution}, *(declared_by(name) for name in ours))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_declared(package: str) -> None:
    """Suites share an environment, so that a forgotten dependency would not show there."""
    folder = Path(next(iter(importlib.import_module(package).__path__)))
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    assert set(undeclared(sources, declared_by(PACKAGES[package]))) <= ASKED_FOR


def test_an_undeclared_import_would_be_found() -> None:
    source = "import torch.nn\n\ndef f():\n    from scipy import sparse\n"
    assert undeclared([source], {"torch"}) == ["scipy"]
