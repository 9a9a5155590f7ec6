"""What the documentation says, held against the code: snippets run, tables and quoted log lines match."""

from __future__ import annotations

import ast
import importlib
import json
import logging.config
import re
import sys
from pathlib import Path

import pytest

import kvsdk
from kvsdk.config import options_table, parse_options, transfer_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next heading of its level or a higher one."""
    level = heading.partition(" ")[0]
    _, found, rest = page.read_text().partition(f"\n{heading}\n")
    assert found, f"{page.name} has no heading {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


# ---- links


@EACH_PAGE
def test_links_lead_to_files_of_this_repository(page):
    links = re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", without_code(page))
    for link in links:
        if link and not link.startswith(("http:", "https:")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@EACH_PAGE
def test_links_within_pages_lead_to_headings(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", without_code(page)):
        target = page.parent / link if link else page
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text()), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page.name} links to {link}#{anchor}"


# ---- Python


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty working directory on Python's path; modules imported from it are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write_modules(page: Path, folder: Path) -> list[str]:
    """Each Python block under the file name in its first line; returns the names of the modules, in order."""
    names = []
    for text in blocks(page, "python"):
        file = re.match(r"# (\w+)\.py\n", text)
        assert file, f"a Python block of {page.name} does not begin with its file's name: {text[:60]!r}"
        (folder / f"{file[1]}.py").write_text(text)
        names.append(file[1])
    return names


def test_no_page_has_python_that_is_not_run():
    with_python = {page.name for page in PAGES if blocks(page, "python")}
    assert with_python == {"authors.md", "operators.md"}


def test_the_authors_page_builds_a_connector_that_passes_its_own_tests(workshop, no_thread_left):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    names = write_modules(ROOT / "docs/authors.md", workshop)
    assert names == ["shelf", "test_shelf", "shelf_for_vllm"]
    tests = importlib.import_module("test_shelf")
    cases = [value for name, value in vars(tests).items() if name.startswith("test_")]
    assert len(cases) == 3
    for number, case in enumerate(cases):
        folder = workshop / str(number)
        folder.mkdir()
        case(folder)


def test_the_connector_of_the_authors_page_loads_from_a_module_of_its_own(workshop):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    write_modules(ROOT / "docs/authors.md", workshop)
    config = KVTransferConfig(
        kv_connector="ShelfConnector", kv_connector_module_path="shelf_for_vllm", kv_role="kv_both"
    )
    found = KVConnectorFactory.get_connector_class(config)
    assert found.connector is importlib.import_module("shelf").ShelfConnector
