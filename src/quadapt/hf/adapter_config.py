"""PEFT's config of our adapters: the public class, and what `adapter_config.json` says about each of them.

On disk an adapter of ours is of the type QUADAPT. PEFT without quadapt knows no such type and refuses it, where it
would otherwise load part of it as plain LoRA, over whatever model it is given. In memory it is a LoRA (`peft_type` is
LORA), so saving, loading, `load_adapter` and resuming are PEFT's own. Which adapter it is, with its settings and the
fingerprint of its base, stands under `auto_mapping`, the one field that PEFT keeps without reading it; a digest over
these, rank and alpha stands beside them, since another rank, alpha or pooling makes another model of the same tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig

from quadapt.errors import CheckpointError, ConfigError
from quadapt.methods import Method, method_named
from quadapt.methods.base import names_of
from quadapt.methods.first import Untuned
from quadapt.nn.adapters import Adapter, adapter_from
from quadapt.nn.objective import CrossEntropy
from quadapt.nn.starts import Zero

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

_RECIPE = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""PEFT's names of what a method's recipe says about its adapter."""

_GRID = ("levels", "bits", "group_size", "zero", "scales")
"""Settings of the grid, which adapters have that quantize in their forward."""

NAMELESS = (
    "adapter_config.json: auto_mapping.quadapt.base_fingerprint is missing or empty, so nothing says which base the "
    "adapter belongs to. Restore the file from its source"
)


class AdapterConfig(LoraConfig):
    """PEFT's config for the adapter of a method, to be used wherever PEFT and trainers take a `LoraConfig`.

    ::

        config = quadapt.AdapterConfig("qa-lora", r=16, lora_alpha=32, task_type="CAUSAL_LM")
        model = get_peft_model(quadapt.load("quantized")[0], config)
        trainer = SFTTrainer("quantized", train_dataset=rows, peft_config=config)

    Methods that train over codes take a model that is quantized already, with its own grid; those that quantize in
    their forward (l4q) take the dense one, and the grid is a setting of theirs. What a method does before an adapter
    is put on (roundings, starts, a tuned dense model) is the work of :func:`quadapt.prepare`.

    Args:
        method: The name of a method (qa-lora, l4q, ..), or a :class:`quadapt.methods.Method`. None for stock LoRA
            over a model that quadapt has quantized.
        settings: Those of PEFT's `LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, `target_modules`, `rank_pattern`,
            `use_rslora`, ..), and those of the method's adapter (`pooling`, `offsets`, ..; with l4q also `bits` and
            `group_size`). By default rank, alpha and dropout are the method's, and `target_modules` is "all-linear".

    Raises:
        ConfigError: The method is more than its adapter, or the adapter has no such setting.
    """

    def __init__(self, method: str | Method | None = None, **settings: Any) -> None:
        super().__init__(**(settings if method is None else _of_method(method, settings)))

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
            raise CheckpointError(NAMELESS)
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


def _of_method(given: str | Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings for the adapter of a method, with our entry; `settings` are PEFT's and the adapter's own."""
    chosen = method_named(given) if isinstance(given, str) else given
    for axis, usual in (("start", Zero.name), ("objective", CrossEntropy.name), ("tune_first", Untuned.name)):
        if getattr(chosen, axis).name != usual:
            raise ConfigError(
                f"method={chosen.name!r} is more than its adapter: its {axis} is {getattr(chosen, axis).name!r}. Use "
                "quadapt.prepare, whose model any trainer takes"
            )
    if chosen.begins_rounded:
        raise ConfigError(
            f"method={chosen.name!r} begins with the codes of a rounding ({chosen.rounding.name}). Use "
            "quadapt.prepare, whose model any trainer takes"
        )
    known = {each.name for each in fields(LoraConfig)}
    own = {name: value for name, value in settings.items() if name not in known}
    grid = _GRID if chosen.adapter.base == "float" else ()
    allowed = {*_RECIPE, *grid, *names_of(type(chosen.adapter))}
    for name in own.keys() - allowed:
        raise ConfigError(
            f"AdapterConfig: {name} is no setting of PEFT's LoraConfig, nor of the adapter of {chosen.name}, which has "
            f"{', '.join(sorted(allowed - set(_RECIPE))) or 'none'}. "
            + ("The grid is that of the quantized model" if name in _GRID else "Leave it out")
        )
    for name, theirs in _RECIPE.items():
        if name in own and theirs in settings:
            raise ConfigError(f"AdapterConfig: {name} and {theirs} are the same. Give one of them")
    chosen = chosen.having(**own)
    if chosen.recipe.dense_steps:
        raise ConfigError("dense_steps are steps of quadapt's own training. Use quadapt tune, or leave them out")
    made = {theirs: getattr(chosen.recipe, name) for name, theirs in _RECIPE.items()}
    given_to_peft = {name: value for name, value in settings.items() if name in known}
    entry = {KEY: {**chosen.adapter.identity(), "base_fingerprint": ""}}
    mapping = {**(settings.get("auto_mapping") or {}), **entry}
    return {"target_modules": "all-linear", **made, **given_to_peft, "auto_mapping": mapping}


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
    **more: Any,
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
        more: Further settings of PEFT's `LoraConfig`.
    """
    about = {
        **adapter.identity(),
        "base_fingerprint": base_fingerprint,
        **({} if start == "zero" else {"start": start}),
    }
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type=task,
        auto_mapping={KEY: about},
        **more,
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


PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = AdapterConfig  # type: ignore[index]  # a string where PEFT has an enum of them
