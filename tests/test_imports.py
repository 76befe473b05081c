"""Every module can be the first that a process imports, whatever it makes PEFT and transformers import in turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import quadapt

EACH = """
import os
import sys
import traceback

import accelerate, datasets, gguf, numba, peft, pydantic, scipy.stats, torch, transformers.trainer, typer

# What is imported above stays, so that a child costs little; these two are run anew by whoever imports them first, and
# after them what waits for them.
for name in ("peft", "transformers.modeling_utils"):
    del sys.modules[name]
assert not [name for name in sys.modules if name.partition(".")[0] == "quadapt"]
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        code = 1
        try:
            __import__(name)
            if "peft" in sys.modules:
                from peft.tuners.lora.model import LoraModel
                assert LoraModel._create_new_module._quadapt, "PEFT was not plugged into"
            if "transformers.modeling_utils" in sys.modules:
                from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
                assert "quadapt" in AUTO_QUANTIZER_MAPPING, "transformers was not plugged into"
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        print("cannot be imported first:", name, flush=True)
"""


LACKING = set() if find_spec("lm_eval") else {"quadapt.harness.lm"}
"""Modules that are derived from a class of an optional package which is not installed here."""


def modules() -> list[str]:
    root = Path(quadapt.__file__).parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if not name.endswith(".__main__") and name not in LACKING)


KNOWN = {"quadapt.hf.identity", "quadapt.hf.adapter_config", "quadapt.hf.tuner", "quadapt.hf.peft_layer", "quadapt.cli"}
"""Modules that could not be imported first once, or that everything begins with."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each module is imported in a fork of one process")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.deep)])
def test_a_module_can_be_imported_first(every: int, run_python: Callable[..., str]) -> None:
    names = modules()
    assert set(names) >= KNOWN
    assert run_python(EACH, *sorted(KNOWN | set(names[::every]))) == ""
