"""An extension of griffe: docstrings of this project as the site shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe

DIFFERS = re.compile(r"^Differs: ((?:.+\n?)(?:[ ]{4}.+\n?)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring as Markdown.

    Where it says how it differs from its source, that is a paragraph of its own; what Sphinx would read (`::` before
    code, roles before names) is written as Markdown does.
    """
    text = DIFFERS.sub(lambda match: "**Differs from the source:** " + re.sub(r"\n[ ]{4}", "\n", match[1]), text)
    text = re.sub(r":(?:func|class|meth|mod):`", "`", text)
    text = re.sub(r"^::\n\n(?=[ ]{4})", "", text, flags=re.MULTILINE)
    return re.sub(r"::\n\n(?=[ ]{4})", ":\n\n", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
