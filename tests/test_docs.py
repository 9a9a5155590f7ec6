"""What the documentation says, held against the code: snippets run, tables and quoted log lines match."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvsdk
from kvsdk.config import Options, options_table, parse_options, transfer_config
from kvsdk.errors import ConfigError

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/my_connector"
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
    page, example = ROOT / "docs/write_a_connector.md", EXAMPLE
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

    monkeypatch.syspath_prepend(EXAMPLE)
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


# ---- the reference


def test_the_reference_is_what_its_script_writes():
    written = reference().page()
    assert (ROOT / "docs/reference.md").read_text() == written, "run: python scripts/reference.py"


def test_the_reference_has_every_public_name_of_the_interface_and_the_kit():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    for module in ("kvsdk.connector", "kvsdk.testing"):
        assert set(importlib.import_module(module).__all__) <= set(headings), module


def test_every_member_of_the_interface_says_what_it_is_for():
    text = section(ROOT / "docs/reference.md", "## kvsdk.connector")
    members = [line for line in text.splitlines() if re.match(r"- (`|the )", line)]
    silent = [line for line in members if not re.match(r"- (`[^`]+`(, [a-z ]+)?|the constructor): \S", line)]
    assert len(members) >= 60
    assert [line for line in silent if not re.fullmatch(r"- `[A-Z_]+ = '[a-z ]+'`", line)] == []


def test_the_reference_shows_no_private_names():
    text = (ROOT / "docs/reference.md").read_text()
    assert re.findall(r"^(?:### |- `)_\w+", text, re.MULTILINE) == []
    assert "dataclass" not in text and "<factory>" not in text and "default_factory" not in text


def reference():
    """scripts/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- commands and options


@pytest.fixture
def file_connector(workshop, monkeypatch):
    """The example is on Python's path, with its entry point, as if it were installed."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (group, points), *others = project["entry-points"].items()
    assert not others
    info = workshop / "my_connector.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    sys.modules.pop("my_connector", None)


def test_every_config_command_is_accepted(file_connector, caplog):
    commands = [(page, text) for page in PAGES for text in CONFIG_COMMAND.findall(page.read_text()) if "…" not in text]
    assert len(commands) >= 9
    for page, text in commands:
        known = ("PyNcclConnector", "LMCacheConnector", "FileConnector")
        assert transfer_config(text)["kv_connector"] in known, f"{page.name}: {text}"
    assert "not checked" not in caplog.text


def test_every_demo_command_is_accepted(file_connector):
    from kvsdk.demo import run

    commands = [
        (page, shlex.split(command)[2:])
        for page in PAGES
        for command in re.findall(r"^kvsdk demo .*$", page.read_text(), re.MULTILINE)
    ]
    assert commands
    for page, arguments in commands:
        assert run._configs(run._parser().parse_args(arguments))["decode"], f"{page.name}: {arguments}"


def test_the_options_table_for_authors_names_options_of_kvsdk():
    listed = re.findall(r"^\| (.*?) \|", section(ROOT / "docs/authors.md", "## Options"), re.MULTILINE)[2:]
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) >= 10
    assert set(names) <= {field.name for field in dataclasses.fields(Options)}


def test_a_wrong_option_of_an_authors_connector_is_logged_as_the_page_says(file_connector, caplog):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from kvsdk.vllm.harness import Engine

    config = {"kv_connector": "my_connector:FileConnector", "kv_connector_module_path": "kvsdk.vllm.connectors"}
    for options in ({"foldr": "/var"}, {}):
        with pytest.raises(ConfigError):
            Engine(config | {"kv_role": "kv_both", "kv_connector_extra_config": options})
    (lines,) = blocks(ROOT / "docs/authors.md", "")[:1]
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == lines.splitlines()


def test_the_page_for_authors_says_what_is_in_a_model():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from kvsdk.vllm.binding import _model_identity

    absent = SimpleNamespace(hf_text_config=None, model="an/id", dtype="float32")
    config = SimpleNamespace(model_config=absent, cache_config=SimpleNamespace(cache_dtype="auto"))
    text = section(ROOT / "docs/authors.md", "## Which KV means the same")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == list(_model_identity(config, Options(kv_role="kv_both")))


def test_the_page_for_authors_tells_the_lifecycles_counters_from_others():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from kvsdk.connector.tasks import TaskState
    from kvsdk.vllm.stats import COUNTERS

    text = section(ROOT / "docs/authors.md", "## Logs and counters")
    named = [name for name in re.findall(r"`(\w+)`", text) if name in COUNTERS]
    own = [f"{what}_{end.value}" for what in ("loads", "saves") for end in TaskState if end is not TaskState.OPEN]
    assert named == list(COUNTERS)
    assert named[:6] == own


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
