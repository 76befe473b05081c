"""Which base an adapter belongs to, and which settings it has: what `adapter_config.json` says, and the checks of it.

On disk an adapter of ours is of the type QUADAPT. PEFT without quadapt knows no such type and refuses it, where it
would otherwise load part of it as plain LoRA, over whatever model it is given. In memory it is a LoRA (`peft_type` is
LORA), so saving, loading, `load_adapter` and resuming are PEFT's own. Which adapter it is, with its settings and the
fingerprint of its base, stands under `auto_mapping`, the one field that PEFT keeps without reading it; a digest over
these, rank and alpha stands beside them, since another rank, alpha or pooling makes another model of the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig
from torch import nn

from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.quantizer import content_of, fingerprint_of
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Adapter, adapter_from

log = logging.getLogger("quadapt")

KEY = "quadapt"
"""The key of our entry in PEFT's `auto_mapping`."""

TYPE = "QUADAPT"
"""The `peft_type` that our adapters have on disk."""

STOCK = "lora"
"""Kind of an adapter whose config has no entry of ours: PEFT's own LoRA."""

_BESIDE = ("base_fingerprint", "start", "digest")
"""What our entry says besides the adapter's kind and settings."""

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""PEFT's settings that change what the same tensors compute."""

_NAMELESS = (
    "adapter_config.json: auto_mapping.quadapt.base_fingerprint is missing or empty, so nothing says which base the "
    "adapter belongs to. Restore the file from its source"
)

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


class QuadaptLoraConfig(LoraConfig):
    """PEFT's config for an adapter of ours, or for stock LoRA over codes: it is written with its identity."""

    def __post_init__(self) -> None:
        read = self.peft_type == TYPE  # only what is read from a file has this type; the line below makes it LORA
        super().__post_init__()
        if read:
            self._check()

    def _check(self) -> None:
        mapping = {} if self.auto_mapping is None else self.auto_mapping
        entry = (mapping.get(KEY) or {}) if isinstance(mapping, dict) else mapping
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"adapter_config.json: auto_mapping holds {entry!r:.80} where the adapter's settings belong. Restore "
                "the file from its source"
            )
        if not entry.get("base_fingerprint"):
            raise CheckpointError(_NAMELESS)
        if entry.get("digest") != _digest(self):
            raise CheckpointError(
                "adapter_config.json: rank, alpha or the settings under auto_mapping.quadapt are not those that the "
                "adapter was trained with: their digest differs. Restore the file from its source"
            )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that PEFT writes, with quadapt's type of adapter and the digest of the settings."""
        entry = {**identity_of(self), "digest": _digest(self)}
        return {**super().to_dict(), "peft_type": TYPE, "auto_mapping": {**(self.auto_mapping or {}), KEY: entry}}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, but keep our entries beside those that it makes for models without a task type."""
        self.auto_mapping = {**(self.auto_mapping or {}), **(kwargs.pop("auto_mapping_dict", None) or {})}
        super().save_pretrained(save_directory, **kwargs)


def lora_config(
    adapter: Adapter,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    base_fingerprint: str = "",
    start: str = "zero",
    task: str | None = "CAUSAL_LM",
) -> LoraConfig:
    """A PEFT config for one of our adapters.

    Args:
        adapter: The adapter, which says what trains.
        rank: The rank of the adapter.
        alpha: The adapter is multiplied by `alpha / rank`.
        dropout: The share of the adapter's inputs that is dropped in training.
        target_modules: The layers that get adapters, as PEFT names them.
        base_fingerprint: The fingerprint of the base, over which alone the adapter loads later. If empty, it is filled
            in when the adapter is put over a base.
        start: Name of the start, if it sets the factors: then the first ones are kept beside the trained.
        task: PEFT's name of what the model does, which decides on PEFT's class of the model; None for its general one.
    """
    about = {
        **adapter.identity(),
        "base_fingerprint": base_fingerprint,
        **({} if start == "zero" else {"start": start}),
    }
    return QuadaptLoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int, and takes any number
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type=task,
        auto_mapping={KEY: about},
    )


def adapter_of(config: LoraConfig) -> Adapter:
    """The adapter that a PEFT config asks for: ours where it names one, else LoRA.

    Raises:
        ConfigError: It asks for a variant of LoRA that has no meaning over codes.
    """
    for option, advice in (
        ("use_dora", "DoRA rescales the dense weight"),
        ("use_qalora", "use quadapt's qa-lora, which merges"),
        ("alora_invocation_tokens", "activated LoRA is not supported"),
    ):
        if getattr(config, option, None):
            raise ConfigError(f"LoraConfig.{option}: {advice}. Leave it unset")
    if config.init_lora_weights not in (True, False, "gaussian", "eva"):
        raise ConfigError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r}: needs the dense weight, which a quantized "
            "layer no longer has. Use True or 'gaussian'"
        )
    return adapter_from(settings_of(config))


def identity_of(config: LoraConfig) -> dict[str, Any]:
    """Our entry in a PEFT config; that of stock LoRA if there is none."""
    entry = dict((config.auto_mapping or {}).get(KEY) or {"kind": STOCK})
    entry.pop("digest", None)
    return entry


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """Kind and settings of the adapter that a PEFT config asks for."""
    return {name: value for name, value in identity_of(config).items() if name not in _BESIDE}


def as_stock(config: LoraConfig) -> LoraConfig:
    """A copy of a config without anything of ours: that of an adapter which stock PEFT serves."""
    stock = object.__new__(LoraConfig)
    stock.__dict__.update(config.__dict__)
    stock.auto_mapping = {name: entry for name, entry in (config.auto_mapping or {}).items() if name != KEY} or None
    return stock


def _digest(config: LoraConfig) -> str:
    """SHA-256 over all settings that change what the adapter's tensors compute."""
    about = {**identity_of(config), "peft": {name: getattr(config, name) for name in _SCALING}}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


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
    if not ours(model, config) or type(config) not in (LoraConfig, QuadaptLoraConfig):
        return config
    entry = (config.auto_mapping or {}).get(KEY)
    if entry is None and config.inference_mode:
        return config
    if entry is not None and type(config) is LoraConfig and not entry.get("base_fingerprint"):
        raise CheckpointError(_NAMELESS)
    found = fingerprint_of(model)
    wanted = identity_of(config).get("base_fingerprint")
    if wanted and found:
        check_same_base(str(wanted), found, dense=not quantized_layers(model))
    named = object.__new__(QuadaptLoraConfig)
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


PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = QuadaptLoraConfig  # type: ignore[index]  # a string where PEFT has an enum of them
