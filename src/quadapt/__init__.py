"""Quantization-aware low-rank fine-tuning of language models: what you train is what you serve.

Importing quadapt makes `transformers` load its checkpoints and PEFT train over them; neither is imported by it.
"""

from __future__ import annotations

from quadapt.hf.hooks import when_imported

__version__ = "0.1.0"


def _plug_into_transformers() -> None:
    import quadapt.hf.quantizer  # noqa: F401 - registers itself


def _plug_into_peft() -> None:
    import quadapt.hf.peft_layer  # noqa: F401 - registers itself


when_imported("transformers.modeling_utils", _plug_into_transformers)
when_imported("peft", _plug_into_peft)
