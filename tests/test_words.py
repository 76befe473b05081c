"""Every public docstring is a sentence that can be understood without its neighbours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "quadapt"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

FEWEST = 5
"""Words that a docstring has at least."""

LEANING = ("Likewise", "Ditto", "The same ", "As ", "Of ", "By ", "That ", "Its ")
"""Beginnings of a docstring that says of something else what it should say of its own."""


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """The public docstrings of a module by name: its own, of classes and functions, and below fields and constants."""
    yield from _inside(ast.parse(source), "")


def _inside(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    said = ast.get_docstring(node)
    if said is not None:
        yield name or "module", said
    for item, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
            yield from _inside(item, f"{name}.{item.name}".lstrip("."))
        if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(below, ast.Expr):
            target = ast.unparse(item.targets[0] if isinstance(item, ast.Assign) else item.target)
            if (
                not target.startswith("_")
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                yield f"{name}.{target}".lstrip("."), below.value.value


def faults(source: str) -> dict[str, str]:
    """The docstrings of a module that cannot stand alone, by name."""
    return {
        name: said
        for name, said in docstrings(source)
        if len(said.split()) < FEWEST or said.lstrip().startswith(LEANING)
    }


@pytest.mark.parametrize("file", FILES)
def test_every_docstring_can_stand_alone(file: str) -> None:
    found = faults((PACKAGE / file).read_text())
    assert not found, f"{file}: write a whole sentence that can be understood alone, for each of {found}"


def test_the_check_finds_what_it_looks_for() -> None:
    source = '''
"""A module with a docstring of its own."""

LIMIT = 3
"""Largest."""

_HIDDEN = 4
"""Hidden."""

class Place:
    """Where to put what is there."""

    device: str
    """That computes something or other here."""

    def go(self) -> None:
        """Go."""

    def _rest(self) -> None:
        """Rest."""
'''
    assert set(faults(source)) == {"LIMIT", "Place.device", "Place.go"}
    assert len(dict(docstrings(source))) == 5
