"""`make gpu`: checks of what runs on a GPU, then its times.

On a machine without one, every kernel and every method's step runs through Triton's interpreter, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "transformers", "peft", "numba", "scipy")
"""Packages that must be there; the others that quadapt uses need not be."""

DEADLINE = 420.0
"""Seconds after which no further section begins: all is to fit in eight minutes."""

MOST_PROCESSES = 14
"""Processes that share the checks on a card, each of which compiles on one core."""


def main() -> None:
    """Run what this machine can."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="only compile, for an absent card (80, 90)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --compile: each Nth case")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/gpu.json)")
    parser.add_argument(
        "--sections",
        nargs="+",
        metavar="NAME",
        help="on a card: only these, added to what the file has of the same card. Default: the checks and all "
        "sections but those of a model of full size, which take several minutes more",
    )
    chosen = parser.parse_args()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"make gpu: {', '.join(missing)}: not installed for {sys.executable}. Install it, or run make install")
    import torch

    if chosen.compile:
        compile_for(chosen.compile, chosen.every)
    elif torch.cuda.is_available():
        on_card(chosen.output, chosen.sections)
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        warnings.simplefilter("ignore")  # of libraries: what is said here is one line
        interpreted()


def compile_for(capability: int, every: int) -> None:
    """Compile the kernels for a card, and print what they need."""
    from benchmarks.gpu.compiled import compiled_for
    from benchmarks.measure import table

    rows = compiled_for(capability, every)
    table(f"compiled for sm_{capability}", tuple(rows[0]), [tuple(row.values()) for row in rows])


def interpreted() -> None:
    """All checks through the interpreter, on the CPU."""
    import torch

    from benchmarks.gpu.checking import checks

    counts, failed = checks(torch.device("cpu"))
    for line in failed:
        print(line)
    done = f"{counts['kernels']} kernel cases and {counts['steps']} steps of models through Triton's interpreter"
    if failed:
        sys.exit(f"No GPU here. {len(failed)} of {done} differ from the CPU.")
    print(f"No GPU here: {done} agree with the CPU; nothing was timed.")


def on_card(output: Path | None, wanted: list[str] | None = None) -> None:
    """Checks and times; a table, and JSON."""
    import torch

    from benchmarks.gpu.checking import checks
    from benchmarks.gpu.rows import ratios, shown
    from benchmarks.gpu.sections import SECTIONS, by_default, sections
    from benchmarks.gpu.steps import compiles
    from benchmarks.measure import RESULTS, environment, table

    unknown = sorted({*(wanted or ())} - SECTIONS.keys())
    if unknown:
        sys.exit(f"make gpu: {', '.join(unknown)}: no such section. There are {', '.join(SECTIONS)}")
    begun = time.monotonic()
    path = output or RESULTS / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _kept(path, card()) if wanted else {"rows": {}}
    if not compiles():
        print(f"torch {torch.__version__} is older than quadapt declares: torch.compile is not checked", flush=True)
    if wanted is None:
        counts, failed = checks(torch.device("cuda"), min(MOST_PROCESSES, os.cpu_count() or 1))
        total = sum(counts.values())
        print(f"{total - len(failed)} of {total} checks agree with the CPU; {_since(begun)}", flush=True)
        for line in failed:
            print(f"  {line}", flush=True)
        found["checks"] = {"run": total, "failed": failed}
    failed = found.setdefault("checks", {"run": 0, "failed": []})["failed"]
    for name, section in sections(wanted or by_default()):
        if time.monotonic() - begun > DEADLINE:
            print(f"{name}: not begun, out of time", flush=True)
            continue
        try:
            found["rows"] |= section()
        except Exception:  # the other sections are measured all the same
            failed.append(f"{name}: {traceback.format_exc().strip().splitlines()[-1]}")
            traceback.print_exc()
        print(f"{name}: {_since(begun)}", flush=True)
        found["rows"] |= ratios(found["rows"])
        found |= {"environment": environment(), "card": card(), "seconds": time.monotonic() - begun}
        path.write_text(json.dumps(found, indent=1) + "\n")  # so far
    table(f"{torch.cuda.get_device_name()}", ("what", "measured", "asked", ""), list(shown(found["rows"])))
    if failed:
        sys.exit(f"{len(failed)} failed, see above")


def _kept(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run on the same kind of card has found."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("card") == about else {"rows": {}}


def _since(begun: float) -> str:
    return f"{time.monotonic() - begun:.0f} s"


def card() -> dict[str, Any]:
    """The card, and what drives it."""
    import torch

    about, tool = torch.cuda.get_device_properties(0), shutil.which("nvidia-smi")
    asked = [tool or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() if tool else None
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    main()
