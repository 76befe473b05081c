"""`make fuzz`: very many damaged inputs, in two processes.

    python -m benchmarks.fuzz --cases 100000 --seed 1 --kinds notes plans

Counts go to `benchmarks/results/fuzz.json`, kind by kind; a kind that was run alone replaces its own row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "fuzz.json"
BATCH = 500
"""Cases that hypothesis makes from one seed: it forgets none of a batch, so batches are short."""


def _batches(total: int, seed: int, kinds: list[str]) -> list[tuple[str, int, int]]:
    """Kind, cases and seed of every batch, in an order in which the time left can be told."""
    from benchmarks.fuzz.kinds import KINDS

    found = []
    for at, (kind, about) in enumerate(KINDS.items()):
        left, number = round(total * about.share), 0
        while left > 0 and (not kinds or kind in kinds):
            size = BATCH if about.share > 0.01 else BATCH // 10
            found.append((kind, min(size, left), 1_000_000 * seed + 10_000 * at + number))
            left, number = left - size, number + 1
    random.Random(seed).shuffle(found)
    return found


def _run(
    total: int, seed: int, kinds: list[str], processes: int, store: Callable[[dict[str, Counter[str]], float], None]
) -> list[str]:
    """Run all batches; `store` is given the counts so far and the seconds, after each."""
    from benchmarks.fuzz.models import make
    from benchmarks.fuzz.run import work

    counts: dict[str, Counter[str]] = {}
    faults: list[str] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="quadapt-fuzz-") as folder:
        make(Path(folder))
        began = time.perf_counter()
        jobs, said = context.Queue(), context.Queue()
        batches = _batches(total, seed, kinds)
        for batch in [*batches, *[None] * processes]:
            jobs.put(batch)
        workers = [context.Process(target=work, args=(Path(folder), jobs, said), daemon=True) for _ in range(processes)]
        for worker in workers:
            worker.start()
        done, all_ = 0, sum(batch[1] for batch in batches)
        for _ in batches:
            kind, found, wrong = said.get()
            counts.setdefault(kind, Counter()).update(found)
            faults += wrong
            done += found.total()
            spent = time.perf_counter() - began
            print(
                f"{done:,} of {all_:,} inputs, {len(faults)} faults, {spent / 60:.1f} min, "
                f"about {spent / done * (all_ - done) / 60:.0f} min left",
                flush=True,
            )
            for fault in wrong:
                print(fault, file=sys.stderr, flush=True)
            store(counts, spent)
        for worker in workers:
            worker.join()
    return faults


def _about() -> dict[str, Any]:
    from quadapt.jobs.source import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "python": platform.python_version(), "versions": versions()}


QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
"""Set before anything imports what reads it."""


def main() -> None:
    """Run, and store what was found."""
    os.environ |= QUIET
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=[], help="only these")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    before = json.loads(RESULTS.read_text())["kinds"] if given.kinds and RESULTS.exists() else {}
    about = _about()

    def store(counts: dict[str, Counter[str]], seconds: float) -> None:
        rows = dict(before)
        for kind in sorted(counts):
            found = counts[kind]
            kept = {name: found[name] for name in ("accepted", "refused", "faults")}
            rows[kind] = {"inputs": found.total(), "seed": given.seed, **kept}
        text = json.dumps({**about, "seconds": round(seconds), "kinds": rows}, indent=2)
        RESULTS.write_text(text + "\n", encoding="utf-8")

    faults = _run(given.cases, given.seed, given.kinds, given.processes, store)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
