"""The adapters. Each registers itself under the name by which it is saved; a new one is one new file in this package.

The names imported here are those that the library itself uses: others are found by `ADAPTERS[name]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from quadapt.errors import CheckpointError
from quadapt.nn.adapters.base import ADAPTERS, Adapter, Param, Params, Source
from quadapt.nn.adapters.codes import CodesAdapter
from quadapt.nn.adapters.elastic import Elastic, ElasticPooled
from quadapt.nn.adapters.grid import GridAdapter
from quadapt.nn.adapters.l4q import L4Q, QATLoRA
from quadapt.nn.adapters.lora import LoRA
from quadapt.nn.adapters.lr_qat import LRQAT
from quadapt.nn.adapters.pooled import Pooled
from quadapt.nn.adapters.scales import Scales

__all__ = [
    "ADAPTERS",
    "L4Q",
    "LRQAT",
    "Adapter",
    "CodesAdapter",
    "Elastic",
    "ElasticPooled",
    "GridAdapter",
    "LoRA",
    "Param",
    "Params",
    "Pooled",
    "QATLoRA",
    "Scales",
    "Source",
    "adapter_from",
]


def adapter_from(identity: Mapping[str, object]) -> Adapter:
    """Make the adapter that :meth:`Adapter.identity` described.

    Raises:
        CheckpointError: Its kind or one of its settings is unknown here.
    """
    settings = dict(identity)
    kind = settings.pop("kind", None)
    if kind not in ADAPTERS:
        raise CheckpointError(
            f"adapter kind {kind!r} is unknown. Known are {', '.join(ADAPTERS)}; a newer quadapt may know it"
        )
    try:
        return ADAPTERS[str(kind)](**settings)
    except TypeError as error:
        raise CheckpointError(
            f"settings {settings} do not fit a {kind} adapter ({error}). Was it saved by another version?"
        ) from None
