"""Compile every Triton kernel for cards that are not there, down to machine code, and say what each needs.

A program that Triton's interpreter runs may still not compile; this shows that it does, how many registers a thread
takes, and that none are spilled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.gpu.cases import cases


class _Absent:
    """Stands in for the driver of a card."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Inside, launches compile for such a card and run nothing; the compiled kernels are collected."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_(self: Any, *args: Any, **options: Any) -> None:
        found.append(run(self, *args, **{**options, "warmup": True}))

    triton.runtime.driver.set_active(_Absent(capability))  # type: ignore[arg-type]
    with mock.patch.object(JITFunction, "run", compile_):
        yield found


def needs(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (spills and arrays that did not fit in them), shared memory.

    And how many operations do not round as the CPU does: fused multiply-adds, approximate divisions, denormals lost.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": kernel.metadata.shared,
        "inexact": len(re.findall(r"\bfma\.|\.(?:full|approx|ftz)\.", kernel.asm["ptx"])),
    }


def compiled_for(capability: int, every: int = 1) -> list[dict[str, Any]]:
    """Compile the cases (each of `every`) for cards of a capability: a row for each kernel, with the most it needs."""
    rows: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for at, case in enumerate(cases(64, 1104, 64)):
        if at % every and case.kernel in rows:
            continue
        with compiling(capability) as kernels:
            case.run(torch.device("cpu"))
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                row = rows.setdefault(case.kernel, {"kernel": case.kernel, "variants": 0})
                row["variants"] += 1
                for name, value in needs(kernel).items():
                    row[name] = max(row.get(name, 0), value)
    return list(rows.values())
