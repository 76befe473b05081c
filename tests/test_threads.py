"""The number of threads is part of what a job on the CPU is, where the last bits of its result depend on it."""

from __future__ import annotations

import torch

from quadapt.config import MergeConfig, QuantizeConfig, TuneConfig
from quadapt.hf.notes import differences
from quadapt.jobs.identity import job_of


def test_another_number_of_threads_is_another_job_and_is_named() -> None:
    before = torch.get_num_threads()
    changed = {}
    try:
        for kind in (QuantizeConfig, TuneConfig, MergeConfig):
            jobs = []
            for threads in (2, 3, 2):
                torch.set_num_threads(threads)
                jobs.append({"form": 1, "job": job_of("any", kind(**fields(kind)))})
            assert jobs[0] == jobs[2]
            changed[kind] = differences(*jobs[:2])
    finally:
        torch.set_num_threads(before)
    assert changed == {QuantizeConfig: ["threads: 2 -> 3"], TuneConfig: ["threads: 2 -> 3"], MergeConfig: []}


def fields(kind: type) -> dict[str, str]:
    """A name of the hub for whatever is read."""
    model = {"adapter": "x"} if kind is MergeConfig else {"model": "x"}
    return {**model, "output": "y", **({"data": "z"} if kind is TuneConfig else {})}
