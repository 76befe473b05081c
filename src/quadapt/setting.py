"""Settings: a field of a piece that users set by name, declared once, where the piece is defined.

A piece is a frozen dataclass, and each of its fields can be set from Python. What is declared with :func:`setting` is
also a flag of the command line and a name in job files; its type, its range, its words and its default are the field's
own. Ranges are written as :data:`Count` and its like, which pydantic reads.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

MOST = 2**31 - 1
"""The largest count that is allowed, which is what libraries below hold in 32 bits."""

Count = Annotated[int, Ge(1), Le(MOST)]
"""A number of things, at least one."""
Whole = Annotated[int, Ge(0), Le(MOST)]
"""A number of things, or 0."""
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
"""The seed of random numbers, of which NumPy takes 32 bits."""
Port = Annotated[int, Ge(0), Le(65535)]
"""The number of a port, which has 16 bits."""
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
"""A part of something that must leave some of it over."""
Ratio = Annotated[float, Ge(0), Le(1)]
Inner = Annotated[float, Gt(0), Lt(1)]
"""A part of something that is neither nothing nor all of it."""


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field."""

    aliases: tuple[str, ...] = ()
    """Further names, those that users of transformers and PEFT type."""

    panel: str = "Options"
    """Heading under which `--help` lists it."""

    positional: bool = False
    """Whether it is an argument rather than an option."""

    idle: bool = False
    """Whether the result is the same whatever it is: an interrupted run is gone on with though it has changed."""

    reads: bool = False
    """Whether it names what is read. That is never overwritten, and is compared by content, not by name."""

    name: str = ""
    """The name under which it is set, where that of the field would be taken for another's."""

    of_piece: bool = False
    """Whether it is a setting of one of the method's pieces, and None leaves it as the method has it."""


def setting(*aliases: str, panel: str, default: Any = MISSING, name: str = "", idle: bool = False) -> Any:
    """A dataclass field that is also a flag; the string below the field is what `--help` says.

    Args:
        aliases: Further flags: `--lr`.
        panel: Heading under which `--help` lists it.
        default: The field's default.
        name: The name under which it is set, if not the field's own.
        idle: Whether the result is the same whatever it is.
    """
    return field(default=default, metadata={"flag": Flag(aliases, panel, idle=idle, name=name)})


def settings_of(piece: type) -> dict[str, dataclasses.Field[Any]]:
    """The declared settings of a dataclass: its fields, by the names under which they are set."""
    return {
        each.metadata["flag"].name or each.name: each for each in dataclasses.fields(piece) if "flag" in each.metadata
    }


@cache
def words_of(piece: type) -> dict[str, str]:
    """The strings below the fields of a class and of those that it is derived from, each on one line, by field."""
    found: dict[str, str] = {}
    for cls in reversed(piece.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for one, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and _is_text(after):
                found[one.target.id] = " ".join(after.value.value.split())  # type: ignore[attr-defined]
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
