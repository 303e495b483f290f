"""Files and functions stay small: what grows past this is cut in two."""

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
FILES = sorted(path for d in ("visiontrain", "tests", "tools") for path in (TOP / d).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TOP)))
def test_file_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
