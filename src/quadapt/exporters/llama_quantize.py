"""llama.cpp's own quantizer: its program `llama-quantize`, or its library in the package llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadapt.errors import ExportError, MissingDependency

Quantizer = Callable[[Path, Path, str], None]
"""A function that is given a GGUF file with dense weights, the file to write, and the name of a mixture of types."""

PROGRAM = "llama-quantize"
"""The name of llama.cpp's program, which is looked for where programs lie (`PATH`)."""


def quantizer() -> Quantizer:
    """Find llama.cpp's quantizer: the program if it is there, else the library.

    Raises:
        MissingDependency: Neither is installed.
    """
    program = shutil.which(PROGRAM)
    if program is not None:
        return lambda source, target, kind: _by_program(program, source, target, kind)
    if importlib.util.find_spec("llama_cpp") is not None:
        return _by_library
    raise MissingDependency(
        f"llama.cpp's quantizer is not installed. Run: pip install 'quadapt[llama]', or put {PROGRAM} on the PATH"
    )


def _by_program(program: str, source: Path, target: Path, kind: str) -> None:
    done = subprocess.run([program, str(source), str(target), kind, "1"], capture_output=True, check=False)
    if done.returncode:
        target.unlink(missing_ok=True)
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ExportError(
            f"{program} cannot quantize {source} to {kind}: {lines[-1] if lines else 'it does not say why'}"
        )


def _by_library(source: Path, target: Path, kind: str) -> None:
    import llama_cpp as llama

    _silence(llama)
    params = llama.llama_model_quantize_default_params()
    number = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if number is None:
        raise ExportError(f"kind={kind!r} is no mixture of types of this llama.cpp. Use another, such as Q4_K_M")
    params.ftype, params.nthread = number, 1
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        target.unlink(missing_ok=True)
        raise ExportError(f"{source}: llama.cpp cannot quantize it to {kind}. Is it of a family that it knows?")


def _silence(llama: Any) -> None:
    """Keep llama.cpp's own lines off the terminal."""
    global _quiet  # the library keeps its address, so the function must live
    if _quiet is None:
        _quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(_quiet, ctypes.c_void_p(0))


_quiet: Any = None
