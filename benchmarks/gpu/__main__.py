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
from collections import Counter
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "triton", "transformers", "peft", "numba", "scipy")
"""Packages that must be there; the others that quadapt uses need not be."""

DEADLINE = 420.0
"""Seconds after which no further section begins: all is to fit in eight minutes."""


def main() -> None:
    """Run what this machine can."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="only compile, for an absent card (80, 90)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --compile: each Nth case")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/gpu.json)")
    chosen = parser.parse_args()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"make gpu: {', '.join(missing)}: not installed for {sys.executable}. Install it, or run make install")
    import torch

    if chosen.compile:
        compile_for(chosen.compile, chosen.every)
    elif torch.cuda.is_available():
        on_card(chosen.output)
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

    counts, failed = checks(torch.device("cpu"))
    for line in failed:
        print(line)
    done = f"{counts['kernels']} kernel cases and {counts['steps']} steps of models through Triton's interpreter"
    if failed:
        sys.exit(f"No GPU here. {len(failed)} of {done} differ from the CPU.")
    print(f"No GPU here: {done} agree with the CPU; nothing was timed.")


def checks(device: torch.device) -> tuple[Counter[str], list[str]]:
    """Run every check: how many there were, and what failed."""
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.steps import CHECKS, named

    counts, failed = Counter[str](), list[str]()
    # What takes time on a card is compiling: of the larger matrices, which have many programs, every third case.
    larger = islice(cases(67, 1100, 64), 0, None, 3) if device.type == "cuda" else ()
    for case in chain(cases(5, 76, 32), larger):
        counts["kernels"] += 1
        try:
            case.check(device)
        except Exception as error:  # each is reported, and all are run
            failed.append(f"{case.kernel}, {case.name}: {_told(error)}")
    for check, name in named(device):
        counts["steps"] += 1
        try:
            CHECKS[check](name, device)
        except Exception as error:
            failed.append(f"{check}, {name}: {_told(error)}")
    return counts, failed


def _told(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if isinstance(error, AssertionError) else repr(error)[:300]


def on_card(output: Path | None) -> None:
    """Checks and times; a table, and JSON."""
    import torch

    from benchmarks.gpu.rows import shown
    from benchmarks.gpu.speed import sections
    from benchmarks.measure import RESULTS, environment, table

    begun = time.monotonic()
    counts, failed = checks(torch.device("cuda"))
    print(f"{sum(counts.values()) - len(failed)} of {sum(counts.values())} checks agree with the CPU", flush=True)
    for line in failed:
        print(f"  {line}", flush=True)
    path, rows = output or RESULTS / "gpu.json", dict[str, Any]()
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, section in sections():
        if time.monotonic() - begun > DEADLINE:
            print(f"{name}: not begun, out of time", flush=True)
            continue
        try:
            rows |= section()
        except Exception:  # the other sections are measured all the same
            failed.append(f"{name}: {traceback.format_exc().strip().splitlines()[-1]}")
            traceback.print_exc()
        seconds = time.monotonic() - begun
        print(f"{name}: {seconds:.0f} s", flush=True)
        about = {"environment": environment(), "card": card(), "seconds": seconds}
        run = {"run": sum(counts.values()), "failed": failed}
        path.write_text(json.dumps({**about, "checks": run, "rows": rows}, indent=1) + "\n")  # so far
    table(f"{torch.cuda.get_device_name()}", ("what", "measured", "asked", ""), list(shown(rows)))
    if failed:
        sys.exit(f"{len(failed)} failed, see above")


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
