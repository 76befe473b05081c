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


KILL = """\
## Killed, and given again

`make kill` kills each command (SIGKILL) at its file-system events: opening for writing, rename, unlink, mkdir, rmdir,
link, truncate, utime and fsync, at which the file is also cut in half; and tune at random moments. Then the same
command is given again. Counted are outputs that differ from an uninterrupted run's in anything but times; losses: a
file of the user is gone, or neither the old nor the new output is whole at the moment of the kill; and reruns that are
refused, fail or hang.
"""


def reliability() -> str:
    """The page."""
    parts = ["# Reliability\n"]
    stored = RESULTS / "fuzz.json"
    if stored.exists():
        parts.append(_fuzz(json.loads(stored.read_text(encoding="utf-8"))))
    stored = RESULTS / "kill.json"
    if stored.exists():
        parts.append(_kill(json.loads(stored.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def _kill(found: dict[str, Any]) -> str:
    columns = ("events", "killed", "differing", "lost", "stuck")
    rows = [(f"`{title}`", *(f"{row[name]:,}" for name in columns)) for title, row in found["commands"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    spread = "" if found["most"] >= 10**6 else f"At most {found['most']} events of each command, spread evenly. "
    return "\n".join(
        [KILL, table(("command", *columns), rows), f"{spread}Commit {found['commit'][:12]}, {versions}.\n"]
    )


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
