"""Every Python example of the README files and of docs/ runs, page by page, top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "*/*/README.md", "*/*/FORMAT.md")
    for path in ROOT.glob(pattern)
)


def python_blocks(page: Path) -> int:
    return len(re.findall(r"^```python", page.read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    examples = list(document.examples())
    assert len(examples) == python_blocks(page), "an example was not recognised"
    for example in examples:
        example.evaluate()


def test_pages_have_examples() -> None:
    with_examples = [page for page in PAGES if python_blocks(page)]
    assert ROOT / "README.md" in with_examples
    assert len(with_examples) >= 6


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(place), f"{page.name} links to {target}"


def test_commands_named_in_the_pages_exist() -> None:
    """`titanmac x`, `blockell-dashboard` and `nox -s x` in shell blocks answer to --help."""
    blocks = "\n".join(
        block
        for page in PAGES
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text("utf-8"), re.S)
    )
    sessions = set(re.findall(r"\bnox -s ([\w-]+)", blocks))
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert sessions
    for session in sessions:
        assert f"def {session}(" in noxfile or session.startswith("test-"), session
    for command in sorted(set(re.findall(r"^titanmac (\w+)", blocks, re.MULTILINE))):
        module = [sys.executable, "-m", "titanmac_integration", command, "--help"]
        assert subprocess.run(module, capture_output=True, check=False).returncode == 0, command
