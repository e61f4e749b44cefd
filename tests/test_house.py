"""The house keeps its shape: short files, short functions, few parameters, and no old words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "perfedrec").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 500, 60, 8


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in given if name not in ("self", "cls")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_files_and_functions_are_short(path: Path) -> None:
    """On the command line a function has a parameter for each option."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    if "cli" in path.parts:
        return
    for node in functions(path):
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
        assert parameters(node) <= MOST_PARAMETERS, node.name


OLD_WORDS = (
    *("Contribution", "Kept", "given_up", "catching_up", "prelude", "unprotected", "Mediator", "Advisor", "Standing"),
    *("ServiceStation", "tallies", "gathered"),
)
STORED = {
    *("privacy/noise.py", "runs/files.py", "runs/summary.py", "methods/federated/state.py", "federation/status.py"),
    *("compare/schema.py", "compare/results.py", "report/bench.py"),
}
"""Files that read what older versions stored, or import a module of that name."""


def test_names_are_the_fields() -> None:
    """A name that was replaced does not come back."""
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in SOURCES
        if str(path.relative_to(ROOT / "src" / "perfedrec")) not in STORED
        for word in OLD_WORDS
        if re.search(rf"\b{word}\b", path.read_text(encoding="utf-8"))
    ]
    assert found == []
