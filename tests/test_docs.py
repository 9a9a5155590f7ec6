"""What the documentation says, held against the code: snippets run, tables and quoted log lines match."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import kvsdk
from kvsdk.config import options_table, parse_options, transfer_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG_COMMAND = re.compile(r"kvsdk config '(\{.*?\})'", re.DOTALL)
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next heading of its level or a higher one."""
    level, lines, inside, in_fence = heading.index(" "), [], False, False
    for line in page.read_text().splitlines(keepends=True):
        in_fence ^= line.startswith("```")
        if inside and not in_fence and re.match(rf"#{{1,{level}}} ", line):
            return "".join(lines)
        if inside:
            lines.append(line)
        inside = inside or line.rstrip() == heading
    assert inside, f"{page.name} has no heading {heading!r}"
    return "".join(lines)


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
    assert with_python == {"authors.md", "operators.md", "write_a_connector.md"}


def test_the_connector_page_builds_the_example():
    """Every file of the example is on the page, in pieces and whole; tests/testing/test_my_connector.py runs it."""
    page, example = ROOT / "docs/write_a_connector.md", ROOT / "examples/my_connector"
    pieces: dict[str, list[str]] = {}
    for text in [*blocks(page, "toml"), *blocks(page, "python")]:
        file = re.match(r"# ([\w/]+\.\w+)(, continued)?\n", text)
        assert file, f"a block of {page.name} does not begin with its file's name: {text[:60]!r}"
        assert bool(file[2]) == (file[1] in pieces), f"{file[1]} is continued before it begins, or begins twice"
        pieces.setdefault(file[1], []).append(text[file.end() :])
    files = [path.relative_to(example) for path in [*example.glob("*.*"), *example.glob("[a-z]*/**/*.*")]]
    made = re.compile(r"\.|build$|__pycache__$|.*\.egg-info$")  # what tools leave there
    kept = {path.as_posix() for path in files if not any(made.match(part) for part in path.parts)}
    assert pieces.keys() == kept
    for name, parts in pieces.items():
        # A piece that goes on within a class is a blank line apart from the one before, any other piece two.
        whole = parts[0] + "".join(("\n" if part.startswith(" ") else "\n\n") + part for part in parts[1:])
        assert whole == (example / name).read_text(), f"{name} differs between {page.name} and {example.name}"


def test_a_class_for_vllm_can_be_made_in_a_module_of_the_authors_own(workshop, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.syspath_prepend(ROOT / "examples/my_connector")
    assert write_modules(ROOT / "docs/authors.md", workshop) == ["connector_for_vllm"]
    config = KVTransferConfig(
        kv_connector="FileConnector", kv_connector_module_path="connector_for_vllm", kv_role="kv_both"
    )
    found = KVConnectorFactory.get_connector_class(config)
    assert found.connector is importlib.import_module("my_connector").FileConnector


def test_the_keys_of_the_operators_page_are_taken_by_both_sides(workshop):
    from kvsdk.connectors.pynccl.scheduler import client_curve, server_curve

    page = ROOT / "docs/operators.md"
    write_modules(page, workshop)
    importlib.import_module("make_keys")
    producer, consumer = (parse_options({}, extra=fields) for fields in curve_configs(page))
    server, client = server_curve(producer), client_curve(consumer)
    assert client.server_key == server.public_key
    assert server.clients == {client.public_key}


def curve_configs(page: Path) -> list[dict]:
    """The options of the commands under "Security"; the connector's name is vLLM's."""
    found = [json.loads(text) for text in CONFIG_COMMAND.findall(section(page, "## Security"))]
    return [{name: value for name, value in fields.items() if name != "kv_connector"} for fields in found]


def test_the_config_for_python_users_is_vllms(workshop):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import KVTransferConfig

    write_modules(ROOT / "docs/operators.md", workshop)
    assert isinstance(importlib.import_module("offline").config(), KVTransferConfig)


# ---- commands and options


def test_every_config_command_is_accepted():
    commands = [(page, text) for page in PAGES for text in CONFIG_COMMAND.findall(page.read_text()) if "…" not in text]
    assert len(commands) >= 8
    for page, text in commands:
        assert transfer_config(text)["kv_connector"] == "PyNcclConnector", f"{page.name}: {text}"


def test_every_option_of_the_proxy_that_a_page_names_is_one(capsys):
    from kvsdk.proxy import main

    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for page in PAGES:
        for command in re.findall(r"^kvsdk proxy .*$", page.read_text(), re.MULTILINE):
            assert set(re.findall(r"--[a-z-]+", command)) <= known, f"{page.name}: {command}"


def test_the_operators_page_lists_every_option():
    page = (ROOT / "docs/operators.md").read_text()
    listed = page.partition("<!-- kvsdk.config.options_table() -->\n")[2].partition("<!-- end -->")[0]
    assert listed == options_table()


def test_the_operators_page_lists_every_counter():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from kvsdk.vllm.stats import COUNTERS

    listed = re.findall(r"^\| `kvsdk_(\w+)_total` \| (.*) \|$", section(ROOT / "docs/operators.md", "## Metrics"), re.M)
    assert dict(listed) == COUNTERS


def test_every_make_target_that_a_page_names_is_one():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", page.read_text(), re.MULTILINE)) <= {
            pair for target in targets for pair in ((target, ""), ("", target))
        }, page.name


# ---- what the code says


def string_constants() -> list[str]:
    """Every string in the package's source; implicitly joined ones as one."""
    trees = [ast.parse(file.read_text()) for file in sorted((ROOT / "kvsdk").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_log_line_of_the_operators_page_is_in_the_code():
    text = section(ROOT / "docs/operators.md", "## What is in the log")
    lines = [line for line in re.findall(r"`([^`]+)`", text) if "…" in line]
    assert len(lines) >= 30
    constants = [re.sub(r"%(?:\.\d)?[sdfg]|%\.\d\w", "…", constant) for constant in string_constants()]
    for line in lines:
        # A line is put together from several strings at these places.
        for part in re.split("…|: |; ", line):
            part = part.strip(" :;,()")
            assert not part or any(part in constant for constant in constants), f"no code says {part!r} of {line!r}"


def test_modules_import_only_what_stands_above_them_in_the_architecture():
    text = section(ROOT / "docs/architecture.md", "## Modules")
    rows = re.findall(r"^\| ((?:`kvsdk\.\w+`(?:, )?)+) \|", text, re.MULTILINE)
    rank = {name: number for number, row in enumerate(rows) for name in re.findall(r"`kvsdk\.(\w+)`", row)}
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "kvsdk").iterdir()}
    assert rank.keys() == parts - {"__init__", "__pycache__"}
    for file in sorted((ROOT / "kvsdk").rglob("*.py")):
        part = file.relative_to(ROOT / "kvsdk").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for imported in imports(file):
            if imported != part:
                assert rank[imported] < rank[part], f"{file.name} of kvsdk.{part} imports kvsdk.{imported}"


def imports(file: Path) -> set[str]:
    """The parts of kvsdk that a module imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("kvsdk.")}


def test_only_kvsdk_vllm_imports_vllm():
    for file in sorted((ROOT / "kvsdk").rglob("*.py")):
        if file.relative_to(ROOT / "kvsdk").parts[0] in ("vllm", "config.py"):
            continue
        assert not re.search(r"^\s*(?:from|import) vllm\b", file.read_text(), re.MULTILINE), file


def test_the_changelog_knows_this_version():
    assert f"\n## {kvsdk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
