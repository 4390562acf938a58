"""The units that the README and the manual page show are those in examples/."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
INSTALLED = Path(sys.prefix) / "share/doc/systemd-socket-proxyd"
PAGE = ROOT / "man/systemd-socket-proxyd.1"

NOT_A_FILE = re.compile(r"[#$] \w")
"""A command to type begins with a prompt."""


def settings(text):
    """The lines that matter: without comments and empty ones, continued lines as one."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = (line.rstrip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def examples():
    """{name of a file in examples/, with its folder: its lines}."""
    paths = (path for path in (ROOT / "examples").rglob("*") if path.is_file())
    files = [path for path in paths if path.suffix not in ("", ".md")]
    return {str(path.relative_to(ROOT / "examples")): settings(path.read_text()) for path in files}


def blocks_of_readme():
    return re.findall(r"^```ini\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def blocks_of_page():
    text = PAGE.read_text().replace(r"\e", "\\")
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not NOT_A_FILE.match(block)]


@pytest.mark.parametrize("block", blocks_of_readme() + blocks_of_page())
def test_units_in_the_documents_are_examples(block):
    shown = settings(block)
    if "[" in block:
        assert shown in examples().values()
    else:  # a part of a file
        assert any(set(shown) <= set(lines) for lines in examples().values())


def test_there_is_something_to_compare():
    assert len(blocks_of_readme()) > 5
    assert len(blocks_of_page()) > 5


def broken_links(page):
    """(links to other files, those of them that lead nowhere)."""
    links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())
    return links, [link for link in links if not (page.parent / link).exists()]


def test_links_of_the_readme_lead_somewhere():
    links, broken = broken_links(README)
    assert links
    assert broken == []


@pytest.mark.skipif(not INSTALLED.exists(), reason=f"SKIPPED LOUDLY: no {INSTALLED}")
def test_links_of_installed_documents_lead_to_installed_files():
    pages = list(INSTALLED.rglob("*.md"))
    assert INSTALLED / "README.md" in pages
    assert {str(page): broken for page in pages if (broken := broken_links(page)[1])} == {}
