"""Which base an adapter belongs to: what is checked before it goes over a model, and before it is merged into one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import LoraConfig
from torch import nn

from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.adapter_config import KEY, NAMELESS, AdapterConfig, identity_of, settings_of
from quadapt.hf.quantizer import content_of, fingerprint_of
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import adapter_from

log = logging.getLogger("quadapt")

_any_base: ContextVar[bool] = ContextVar("any_base", default=False)


@contextmanager
def any_base() -> Iterator[None]:
    """Let adapters load, and merge, over another base than they were trained over; each says so in the log.

    ::

        with quadapt.any_base():
            model = PeftModel.from_pretrained(another_base, "adapter")
    """
    token = _any_base.set(True)
    try:
        yield
    finally:
        _any_base.reset(token)


def ours(model: nn.Module, config: Any) -> bool:
    """Whether an adapter is ours to check: it is one of ours, or a stock LoRA over a model that we have quantized."""
    if not isinstance(config, LoraConfig):
        return False
    return KEY in (config.auto_mapping or {}) or bool(quantized_layers(model))


def admit(model: nn.Module, config: Any) -> Any:
    """Decide whether an adapter may go over a model, before anything of the model is changed.

    Args:
        model: The base, with or without other adapters.
        config: PEFT's config of the adapter.

    Returns:
        The config to go on with: of an adapter of ours one that names its base. A stock LoRA that is about to be
        trained over codes becomes one of ours. A stock LoRA that is loaded carries no identity, and gets none.

    Raises:
        CheckpointError: The adapter was trained over another base, or no longer says over which.
    """
    if not ours(model, config) or type(config) not in (LoraConfig, AdapterConfig):
        return config
    entry = (config.auto_mapping or {}).get(KEY)
    if entry is None and config.inference_mode:
        return config
    if entry is not None and type(config) is LoraConfig and not entry.get("base_fingerprint"):
        raise CheckpointError(NAMELESS)
    found = fingerprint_of(model)
    wanted = identity_of(config).get("base_fingerprint")
    if wanted and found:
        check_same_base(str(wanted), found, dense=not quantized_layers(model))
    named = object.__new__(AdapterConfig)
    named.__dict__.update(config.__dict__)
    named.auto_mapping = {
        **(config.auto_mapping or {}),
        KEY: {**identity_of(config), "base_fingerprint": wanted or found},
    }
    return named


def check_merging(model: Any) -> bool:
    """Compare the bases that the active adapters of a model name with what lies under them, computed from its tensors.

    Returns:
        Whether all are the same; otherwise :func:`any_base` is in force.

    Raises:
        CheckpointError: An adapter was trained over another base.
    """
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    named = {identity_of(model.peft_config[name]).get("base_fingerprint") for name in active}
    found = content_of(model)
    return all([check_same_base(str(wanted), found) for wanted in named if wanted])


def check_same_base(wanted: str, found: str, *, dense: bool = False) -> bool:
    """Compare the fingerprint that an adapter names with that of a base.

    Returns:
        Whether they are the same; otherwise :func:`any_base` is in force.

    Raises:
        CheckpointError: They differ, and this was not asked for.
    """
    if wanted == found:
        return True
    what = "this one is a dense model or has another dtype" if dense else "this one"
    if _any_base.get():
        log.warning("an adapter of the base %s goes over another one, %s, as asked", wanted[:12], found[:12])
        return False
    raise CheckpointError(
        f"this adapter was trained over another base (fingerprint {wanted[:12]}, {what} has {found[:12]}). Give its "
        "own base with --base (base= in Python), or ask for this one with --any-base (any_base=True, or "
        "quadapt.any_base() around PEFT's own calls)"
    )


def check_same_adapter(known: LoraConfig, given: LoraConfig) -> None:
    """Refuse to put the tensors of one adapter into the place of another kind, or with other settings.

    Raises:
        ConfigError: The two differ in kind, settings, rank, alpha or base; the message says in what.
    """
    if adapter_from(settings_of(known)) != adapter_from(settings_of(given)):
        raise ConfigError(
            f"the folder holds another adapter, {_written(settings_of(given))}; the one in memory is "
            f"{_written(settings_of(known))}. Load it under a name of its own"
        )
    for name in ("r", "lora_alpha", "use_rslora"):
        if getattr(known, name) != getattr(given, name):
            raise ConfigError(
                f"the folder's adapter has {name}={getattr(given, name)}, the one in memory {getattr(known, name)}. "
                "Load it under a name of its own"
            )
    wanted, found = (identity_of(each).get("base_fingerprint") for each in (given, known))
    if wanted and found:
        check_same_base(str(wanted), str(found))


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
