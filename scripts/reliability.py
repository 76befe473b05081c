"""`docs/reliability.md`: what was tried to break it, and what came of that."""

from __future__ import annotations

import json
from typing import Any

from compared import RESULTS, table

FUZZ = """\
## Damaged and odd input

`make fuzz` makes inputs by hypothesis, from a seed: settings as flags, YAML and Python; data; and the files of tiny
models, adapters, plans and interrupted runs with changes to the tree of their JSON, to the header of their
safetensors, and to their bytes. Each goes through the commands, in process. It must be refused in a sentence (exit code
2), or accepted with the result that the whole input has. A fault is a traceback or "This is a bug"; an input whose
damage changed the numbers (or the certificate, with `inspect --verify`) and that is accepted nevertheless; more than
10 s of processor time; an output of a command that failed. 2,000 of them run in `make test`.

What cannot be told from a whole input is none of these: another valid number in the file of a dense model, say, of
which there is no digest.
"""


def reliability() -> str:
    """The page."""
    parts = ["# Reliability\n"]
    stored = RESULTS / "fuzz.json"
    if stored.exists():
        parts.append(_fuzz(json.loads(stored.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def _fuzz(found: dict[str, Any]) -> str:
    columns = ("inputs", "accepted", "refused", "faults")
    rows = [(kind, *(f"{row[name]:,}" for name in columns)) for kind, row in found["kinds"].items()]
    sums = [sum(row[name] for row in found["kinds"].values()) for name in columns]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            FUZZ,
            table(("input", *columns), [*rows, ("all", *(f"{each:,}" for each in sums))]),
            f"Commit {found['commit'][:12]}, Python {found['python']}, {versions}; "
            f"{found['seconds'] / 60:.0f} minutes in two processes.\n",
        ]
    )
