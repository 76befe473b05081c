"""An extension of griffe: docstrings of this project as the site shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe

SAID = re.compile(r"^(Source|Differs): (.+(?:\n[ ]{4}.+)*)\n?", re.MULTILINE)
WORDS = {"Source": "Source", "Differs": "Differs from the source"}


def as_markdown(text: str) -> str:
    """A docstring as Markdown.

    What it says of its source, and of how it differs from that, are paragraphs of their own; what Sphinx would read
    (`::` before code, roles before names) is written as Markdown does.
    """
    text = SAID.sub(lambda match: f"\n**{WORDS[match[1]]}:** " + re.sub(r"\n[ ]{4}", "\n", match[2]) + "\n", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # of code; the singular is a note
    text = re.sub(r":(?:func|class|meth|mod):`", "`", text)
    text = re.sub(r"^::\n\n(?=[ ]{4})", "", text, flags=re.MULTILINE)
    return re.sub(r"::\n\n(?=[ ]{4})", ":\n\n", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
