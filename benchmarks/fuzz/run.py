"""Cases by the seed: made by hypothesis, run one after the other, counted."""

from __future__ import annotations

import faulthandler
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz.kinds import KINDS

STUCK = 300
"""Seconds after which a case is taken for a hang: where it hangs is printed, and the process ends."""


def fuzz(
    kind: str, shelf: Path, cases: int, number: int, *, stop: bool, tick: Callable[[int], None] = lambda _: None
) -> tuple[Counter[str], list[str]]:
    """Run cases of a kind.

    Args:
        kind: A key of KINDS.
        shelf: The folder that `models.make` filled.
        cases: How many.
        number: The seed.
        stop: Raise at the first fault, with the smallest example that hypothesis finds; else faults are counted.
        tick: Called after every case.

    Returns:
        How many were accepted, refused, and ended as none may; and what was said of these.
    """
    counts: Counter[str] = Counter()
    faults: list[str] = []
    about = KINDS[kind]

    def case(example: object) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            counts["accepted" if about.run(shelf, scratch, example) else "refused"] += 1
        except BaseException as error:
            if stop or isinstance(error, KeyboardInterrupt):
                raise
            counts["faults"] += 1
            faults.append(f"{kind}: {example!r:.600}\n{_where(error)}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(scratch, ignore_errors=True)
        tick(1)

    checked = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink) if stop else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )(given(about.examples)(case))
    state = random.getstate()
    seed(number)(checked)()
    random.setstate(state)
    return counts, faults


def _where(error: BaseException) -> str:
    """What was said, and where in the package its cause is."""
    frames = traceback.format_tb((error.__cause__ or error).__traceback__)
    return "".join([*frames[-5:], *traceback.format_exception_only(error)])[-3500:]


def work(shelf: Path, jobs: Any, said: Queue[Any]) -> None:
    """Take batches from the queue until it is empty."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    while True:
        job = jobs.get()
        if job is None:
            return
        kind, cases, number = job
        said.put((kind, *fuzz(kind, shelf, cases, number, stop=False)))
