"""Checkpoints that others have quantized, read into the stored form without rounding anything anew.

One file for each format. A new one is a class that registers itself in :data:`IMPORTERS`; what it has to answer is in
:class:`Importer`. Which folder is read by which, and how a model is made of it, is in `hf/imported.py`.
"""

from quadapt.importers.base import IMPORTERS, FileImporter, Importer, Parts

__all__ = ["IMPORTERS", "FileImporter", "Importer", "Parts"]
