"""The page on reliability names tests and faults that exist, and every kind of fault."""

import ast
import re
from pathlib import Path

import pytest

from tests.faults.kinds import KINDS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/test_\w+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in functions


def test_every_kind_of_fault_is_on_the_page() -> None:
    missing = [kind for kind in KINDS if f"`{kind}`" not in PAGE]
    assert not missing


def test_every_mistake_of_others_has_its_tests() -> None:
    (section,) = re.findall(r"## Mistakes that others made\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 10
    assert all("::test_" in row for row in rows)
