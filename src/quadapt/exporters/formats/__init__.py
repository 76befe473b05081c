"""The formats in which a model can be handed over, one file each, known by name in :data:`EXPORTERS`.

These modules are light: they say what a format can hold and which options it has, and import torch, transformers and
the code that writes only when they are asked to. So `quadapt export --help` can list them at once.
"""

from quadapt.exporters.formats.base import EXPORTERS, Answer, Exporter, Origin, Progress

__all__ = ["EXPORTERS", "Answer", "Exporter", "Origin", "Progress"]
