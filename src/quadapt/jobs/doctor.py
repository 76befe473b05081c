"""`quadapt doctor`: versions, devices, what is missing for what, and whether the kernels are right on this machine."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from quadapt.config import DoctorConfig
from quadapt.errors import ResourceError
from quadapt.kernels.dispatch import set_for
from quadapt.kernels.selfcheck import Check, checks
from quadapt.quant.products import product_dtype
from quadapt.report.memory import machine_bytes
from quadapt.report.ui import UI

SERVES = {
    "demo": "runs GGUF files; draws plans and the demo's figures",
    "eval": "runs the tasks of lm-eval",
    "images": "opens pictures",
    "llama": "quantizes as llama.cpp does, for compare",
    "mlx": "runs MLX folders",
    "onnx": "writes, and runs, models for ONNX Runtime",
    "openvino": "writes, and runs, models for OpenVINO",
    "report": "draws the page of compare and report",
    "serve": "serves models over HTTP",
    "torchao": "reads and writes torchao folders",
}
"""What each group of optional packages is for; one that is not here is named by itself."""

_OWN = ("dev", "docs")
"""Groups that users of the package do not need."""

_KERNELS = {"cpu": "numba", "cuda": "Triton", "reference": "plain torch"}


def doctor(config: DoctorConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt doctor` and return what was found.

    Raises:
        ResourceError: A kernel is wrong, or cannot run, on a device.
    """
    packages, devices = _packages(), _devices()
    ui.show(f"quadapt {version('quadapt')}, Python {platform.python_version()}, {platform.platform()}")
    needed = [(row["package"], row["version"]) for row in packages if not row["for"]]
    ui.show(", ".join(f"{name} {found}" for name, found in needed))
    optional = [row for row in packages if row["for"]]
    ui.table(
        "optional packages",
        ("package", "version", "what it is for", "to install it"),
        [(row["package"], row["version"] or "missing", row["for"], row["install"]) for row in optional],
    )
    ui.table(
        "devices",
        ("device", "memory, GB", "free, GB", "kernels", "bfloat16 is multiplied in"),
        [(row["name"], row["memory"] / 1e9, row["free"] / 1e9, row["kernels"], row["products"]) for row in devices],
    )
    result: dict[str, Any] = {"packages": packages, "devices": devices}
    if config.kernels:
        result["kernels"] = [row for device in devices for row in _checked(device["device"], ui)]
        wrong = [f"{row['kernel']} on {row['device']}" for row in result["kernels"] if not row["right"]]
        if wrong:
            raise ResourceError(
                f"kernels are wrong on this machine: {', '.join(wrong)}. Delete numba's cache (NUMBA_CACHE_DIR, or "
                "__pycache__ beside quadapt's kernels), update the driver and torch, and report it if it stays so"
            )
    return result


def _packages() -> list[dict[str, str]]:
    """The packages that quadapt needs, and those that some of it needs, each with the version that is installed."""
    found: dict[str, dict[str, str]] = {}
    for requirement in requires("quadapt") or []:
        named = re.match(r"[A-Za-z0-9._-]+", requirement)
        group = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        if named is None or (group and group[1] in _OWN) or named[0] in found:
            continue
        words = "" if group is None else SERVES.get(group[1], group[1])
        install = "" if group is None else f"pip install 'quadapt[{group[1]}]'"
        try:
            have = version(named[0])
        except PackageNotFoundError:
            have = ""
        found[named[0]] = {"package": named[0], "version": have, "for": words, "install": "" if have else install}
    return list(found.values())


def _devices() -> list[dict[str, Any]]:
    """The processor and every GPU: memory in bytes, the kernels that serve it, and how short floats are multiplied."""
    found = []
    for name in ("cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))):
        device = torch.device(name)
        memory, free = machine_bytes(name)
        called = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        products = product_dtype(torch.empty(0, dtype=torch.bfloat16, device=device))
        found.append(
            {
                "device": name,
                "name": f"{name}: {called}",
                "memory": memory,
                "free": free,
                "kernels": _KERNELS[set_for(device)],
                "products": str(products).removeprefix("torch."),
            }
        )
    return found


def _processor() -> str:
    from llvmlite.binding import get_host_cpu_name

    return f"{get_host_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _checked(device: str, ui: UI) -> list[dict[str, Any]]:
    """Every kernel on a device, with a line for those that are wrong."""
    rows = []
    for found in checks(torch.device(device)):
        rows.append({"device": device, **asdict(found), "right": found.right})
        if not found.right:
            ui.show(f"WRONG on {device}: {found.kernel}: {_how(found)}")
    right = sum(row["right"] for row in rows)
    ui.show(f"{device}: {right} of {len(rows)} kernels compute what plain torch does")
    return rows


def _how(found: Check) -> str:
    return found.words or f"differs by {found.error:.1e} of the largest number, where {found.limit:.0e} is allowed"
