"""The adapters, by the name under which they are saved. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from quadapt.errors import CheckpointError
from quadapt.nn.adapters.base import Adapter
from quadapt.nn.adapters.lora import LoRA
from quadapt.nn.adapters.pooled import Pooled

__all__ = ["ADAPTERS", "Adapter", "LoRA", "Pooled", "adapter_from"]

ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "pooled": Pooled}


def adapter_from(identity: Mapping[str, object]) -> Adapter:
    """The adapter that :meth:`Adapter.identity` described.

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
