"""Quantization-aware low-rank fine-tuning of language models: what you train is what you serve.

Importing quadapt makes `transformers` load its checkpoints and PEFT train over them; neither is imported by it.
"""

from __future__ import annotations

from quadapt.hf.hooks import when_imported

__version__ = "0.1.0"


def _plug_into_transformers() -> None:
    from quadapt.hf.quantizer import register

    register()


def _plug_into_peft() -> None:
    from quadapt.hf.peft_layer import register

    register()


when_imported("peft", _plug_into_peft)
when_imported("transformers.modeling_utils", _plug_into_transformers)
