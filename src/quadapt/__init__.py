"""Quantization-aware low-rank fine-tuning of language models: what you train is what you serve.

Importing quadapt makes `transformers` load its checkpoints and PEFT train over them; neither is imported by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quadapt.errors import QuadaptError
from quadapt.hf.plug import plug_into_lm_eval, plug_into_peft, plug_into_transformers
from quadapt.hooks import when_imported

if TYPE_CHECKING:
    from quadapt.api import export, load, merge, prepare
    from quadapt.hf.adapter_config import AdapterConfig
    from quadapt.hf.config import QuadaptConfig
    from quadapt.hf.identity import any_base

    __version__: str

__all__ = ["AdapterConfig", "QuadaptConfig", "QuadaptError", "any_base", "export", "load", "merge", "prepare"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: torch and transformers take seconds."""
    if name in ("export", "load", "merge", "prepare"):
        from quadapt import api

        return getattr(api, name)
    if name == "AdapterConfig":
        from quadapt.hf.adapter_config import AdapterConfig

        return AdapterConfig
    if name == "QuadaptConfig":
        from quadapt.hf.config import QuadaptConfig

        return QuadaptConfig
    if name == "any_base":
        from quadapt.hf.identity import any_base

        return any_base
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'quadapt' has no attribute {name!r}")


def _version() -> str:
    """The version that was installed; it was read off the tag when the package was built.

    Sources that run without being installed (`PYTHONPATH=src`) do not know theirs, and count as older
    than the first release.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("quadapt")
    except PackageNotFoundError:
        return "0.1.dev0"


when_imported("transformers.modeling_utils", plug_into_transformers)
when_imported("peft", plug_into_peft)
when_imported("lm_eval.models", plug_into_lm_eval)
