"""The page on faults of earlier connectors names tests that exist."""

import ast
import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "prior_faults.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_each_test_that_the_page_names_exists(file):
    named = {test for other, test in NAMED if other == file}
    assert named <= names_in(file), f"tests/{file} has no {', '.join(sorted(named - names_in(file)))}"


def test_each_fault_has_a_test_and_each_of_the_fourteen_its_row():
    rows = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith(("| ---", "| #", "| thread"))
    ]
    assert len(rows) >= 14 + 2 + 9 + 3
    assert [row for row in rows if "::test_" not in row] == []
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == list(range(1, 15))
