"""Go on from an adapter: over the same base, with new data, into a new folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quadapt.config import TuneConfig, checked
from quadapt.config.grid import Grid
from quadapt.errors import CheckpointError, ConfigError
from quadapt.hf.also import also, widen
from quadapt.hf.compressed import attach
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.peft_layer import adapter_of
from quadapt.hf.reading import reading
from quadapt.methods import METHODS, method_named
from quadapt.setting import settings_of

_BESIDES = ("train_tokens", "train_also")
_OF_STARTS = ("start", "fisher", "train_start")
_BY_LAYER = ("exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora")
_OF_ADAPTER = ("target_modules", *_BY_LAYER, "rank", "alpha", "pooling", "init", "form", *_OF_STARTS, *_BESIDES)
_OF_BASE = ("plan", "offload", *(name for name in Grid.model_fields if name.startswith("calibration")))
"""Settings of quantizing alone; here they have no meaning."""

FIXED = (*(name for name in Grid.model_fields if name not in _OF_BASE), *_OF_ADAPTER)
"""Settings that an adapter fixes for all further training."""


@dataclass(frozen=True)
class Earlier:
    """The adapter to go on from."""

    folder: Folder
    """The folder that the adapter lies in."""

    base: Folder
    """The folder of the model that the adapter belongs to."""

    def about(self) -> dict[str, Any]:
        """What the new adapter's note says of it."""
        before = self.folder.note.get("from") or {}
        steps = int(self.folder.note.get("steps") or 0) + int(before.get("steps") or 0)
        return {"adapter": str(self.folder.path.resolve()), "steps": steps}

    def attach(self, model: nn.Module, dropout: float, roles: Sequence[str] = (), stored: Any = None) -> Any:
        """The PEFT model with the adapter as it was left, ready to train on.

        Args:
            model: The base.
            dropout: The share of the adapter's inputs that is dropped in training.
            roles: What trains beside it (:data:`quadapt.hf.also.ROLES`).
            stored: The dtype of the base on disk.

        Raises:
            CheckpointError: The base is another one, or the adapter's files are damaged.
        """
        besides = also(model, roles)
        adapted = reading(self.folder.name, attach, model, self.folder.path, dropout=dropout)
        if besides.modules or besides.biases:
            widen(adapted, besides, stored)
        return adapted


def going_on(config: TuneConfig, folder: Folder) -> tuple[TuneConfig, Earlier]:
    """Settings with those that the adapter fixes, and the adapter.

    Raises:
        ConfigError: One of those was given, and is another.
        CheckpointError: The base is not there, or the adapter is none that quadapt trains.
    """
    from peft import PeftConfig

    about: Any = reading(folder.name, PeftConfig.from_pretrained, folder.name)
    base = open_folder(find_base(folder))
    adapter = reading(folder.name, adapter_of, about)
    if base.kind == "adapter" or (base.kind == "model") != (adapter.base == "float"):
        raise CheckpointError(
            f"{folder.name}: a {adapter.kind} adapter over {base.name!r}, a {base.kind} model, cannot be trained on. "
            "Train a new one over it"
        )
    settings = (folder.note.get("settings") or {}).items()  # where earlier versions wrote false, it is not given now
    noted = {name: value for name, value in settings if name in FIXED and value is not False}
    likely = (name for name in METHODS if method_named(name).adapter.kind == adapter.kind)
    method = noted.get("method") or next(likely, None)
    if method is None:
        raise CheckpointError(f"{folder.name}: no method trains {adapter.kind} adapters")
    own = {name: getattr(adapter, each.name) for name, each in settings_of(type(adapter)).items() if name in FIXED}
    fixed = {**noted, **own, "method": method, "rank": about.r, "alpha": about.lora_alpha}
    need = {"model": config.model, "data": config.data, "output": config.output}
    old = checked(TuneConfig, {**need, **fixed}, f"{folder.name}: ")
    _refuse_others(config, old)
    taken = {name: getattr(old, name) for name in FIXED}
    return config.model_copy(update=taken), Earlier(folder, base)


def _refuse_others(config: TuneConfig, old: TuneConfig) -> None:
    for name in _OF_BASE:
        if name in config.model_fields_set and getattr(config, name) != TuneConfig.model_fields[name].default:
            raise ConfigError(f"{name} has no meaning here: the base of {config.model!r} lies ready. Leave it out")
    if config.value("dense_steps"):
        raise ConfigError(f"dense_steps: {config.model!r} has been trained with its quantizer already. Leave it out")
    for name in FIXED:
        wanted, fixed = getattr(config, name), getattr(old, name)
        if name in config.model_fields_set and wanted != fixed and not _same(old, name, wanted):
            raise ConfigError(
                f"{name}={wanted!r}: {config.model!r} was trained with {fixed!r}, and that is fixed. Leave it out, or "
                "train a new adapter over its base"
            )


def _same(old: TuneConfig, name: str, value: Any) -> bool:
    """Whether the value only says what is the case anyway: the default, say."""
    if name in ("target_modules", "skip", *_BY_LAYER, *_BESIDES):
        return False
    try:
        one, other = (each.spec.method for each in (old, old.model_copy(update={name: value})))
    except ConfigError:
        return False
    parts = ("format", "storage", "rounding", "start", "adapter")
    return all(getattr(one, part) == getattr(other, part) for part in parts) and all(
        getattr(one.recipe, part) == getattr(other.recipe, part) for part in ("rank", "alpha")
    )
