"""PEFT's and transformers' own doors, through which adapters are loaded: behind each, whole ones alone come in.

PEFT warns about tensors that a file lacks and goes on with untrained ones, and ignores those that it does not know. An
adapter of ours, and any over a model that we have quantized, must have exactly the tensors that its config asks for.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.errors import CheckpointError, ConfigError, locate
from quadapt.model.select import ends_of
from quadapt.nn.adapters import ADAPTERS, adapter_from
from quadapt.nn.adapters.base import FIRST

log = logging.getLogger("quadapt")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that a trained tensor may be stored in."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors, in a PeftModel and in its files."""


def check_whole(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: tuple[str, ...] = ()) -> None:
    """Compare the tensors of an adapter file with those that its config asks for.

    Args:
        found: What the file holds, by name.
        expected: What there should be; dtypes may be other floats.
        allowed: Beginnings of names that may be there besides: embeddings of the base, which PEFT saves along.

    Raises:
        CheckpointError: A tensor is missing, or one too many, or has another shape, is no float, or is not finite.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not name.startswith(allowed or "\0")]
    for names, what in ((missing, "lacks"), (extra, "has, though its adapter_config.json does not ask for them,")):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"the adapter's file {what} {', '.join(names[:3])}{rest} ({len(found)} tensors, {len(expected)} are "
                "needed). It is incomplete, or belongs to another adapter_config.json. Copy both again"
            )
    for name, tensor in found.items():
        shape = expected[name].shape if name in expected else tensor.shape
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name}: has the shape {tuple(tensor.shape)} in the adapter's file, and {tuple(shape)} by its "
                "adapter_config.json over this model. One of them belongs to another adapter"
            )
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name}: is held as {dtype} in the adapter's file, and adapters are float32, float16 or bfloat16. The "
                "file is damaged; copy it again from its source"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name}: has NaN or infinite numbers in the adapter's file. Training diverged, or the file is damaged"
            )


def _expected(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter as a file should have them."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def _embeddings(model: Any) -> tuple[str, ...]:
    """Names of the base's embeddings and head, with which the names of their tensors begin."""
    layers = ends_of(model)
    return tuple(
        f"{name.removeprefix(PREFIX)}."
        for name, module in model.named_modules()
        if any(module is each for each in layers)
    )


def _of_our_making(names: Iterable[str]) -> bool:
    """Whether tensors are an adapter's of ours, by names that no other has, whatever its config says."""
    declared = {*FIRST, *(name for cls in ADAPTERS.values() for name in cls.extra)}
    parts = {f"lora_{name}" for name in declared}
    return any(parts.intersection(name.split(".")) for name in names)


def check_state(model: Any, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state`, named as in a file, is a whole adapter `adapter_name` of the model."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    check_whole(found, _expected(model, adapter_name), _embeddings(model))


def _config_in(folder: Any, **hub: Any) -> Any:
    """The PEFT config in a local folder; None if there is none."""
    from peft import PeftConfig

    place = Path(str(folder), hub.get("subfolder") or "")
    return PeftConfig.from_pretrained(str(place)) if (place / "adapter_config.json").is_file() else None


def _check_given(model: nn.Module, adapter_name: str, folder: Any, given: Any) -> None:
    """What a folder's config says, against the adapter that is there already under the name it is loaded under."""
    from quadapt.hf.adapter_config import KEY
    from quadapt.hf.identity import check_same_adapter, ours

    configs: Any = getattr(model, "peft_config", {})
    known = configs.get(adapter_name)
    if known is not None and given is not None and (ours(model, known) or KEY in (given.auto_mapping or {})):
        check_same_adapter(known, given)
    if given is not None and ours(model, given) and KEY not in (given.auto_mapping or {}):
        log.warning(
            "%s names no base, since it was not saved through quadapt: whether it was trained over this one cannot be "
            "checked",
            folder,
        )


def set_state(stock: Callable[..., Any], model: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `set_peft_model_state_dict`, as `load_adapter` calls it; the public function stays."""
    from quadapt.hf.identity import ours

    name = kwargs.get("adapter_name", args[0] if args else "default")
    if ours(model, model.peft_config[name]) or _of_our_making(state):
        check_state(model, name, state)
    return stock(model, state, *args, **kwargs)


def load_into_peft_model(
    stock: Callable[..., Any], self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Run PEFT's `PeftModel.load_adapter` after a check that the adapter belongs to this base."""
    with locate(str(model_id)):
        _check_given(self, adapter_name, model_id, _config_in(model_id, **kwargs))
        return stock(self, model_id, adapter_name, *args, **kwargs)


def check_swap(stock: Callable[..., Any], known: Any, given: Any) -> None:
    """Hot-swapping copies `lora_A` and `lora_B` alone, whatever else an adapter of ours has."""
    from quadapt.hf.adapter_config import KEY, identity_of, settings_of
    from quadapt.hf.identity import check_same_adapter

    stock(known, given)
    if not any(KEY in (each.auto_mapping or {}) for each in (known, given)):
        return
    check_same_adapter(known, given)
    adapter = adapter_from(settings_of(known))
    if adapter.extra or identity_of(known).get("start"):
        raise ConfigError(
            f"hot-swapping copies lora_A and lora_B alone, and this {adapter.kind} adapter has more that trains. Load "
            "it under a name of its own, and switch with set_adapter"
        )


def load_into_model(stock: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run transformers' `model.load_adapter` between checks that the adapter fits and that its file is whole."""
    from quadapt.hf.identity import ours

    call = inspect.signature(stock).bind(self, *args, **kwargs)
    call.apply_defaults()
    folder, name = call.arguments["peft_model_id"], call.arguments["adapter_name"] or "default"
    state, swapped = call.arguments["adapter_state_dict"], name in getattr(self, "peft_config", {})
    with locate(str(folder or "adapter")):
        given = call.arguments["peft_config"] or _config_in(folder, **(call.arguments["adapter_kwargs"] or {}))
        _check_given(self, name, folder, given)
        if swapped:
            check_swap(lambda *_: None, self.peft_config[name], given or self.peft_config[name])
        info = stock(self, *args, **kwargs)
        if ours(self, self.peft_config[name]) or _of_our_making(info.unexpected_keys):
            try:
                _check_loaded(self, name, folder, state, info)
            except CheckpointError:
                if not swapped:
                    self.delete_adapter(name)
                raise
    return info


def _check_loaded(model: Any, name: str, folder: Any, state: Mapping[str, Tensor] | None, info: Any) -> None:
    """The tensors that were loaded, as the file has them; of a file on the hub, what the loader says about them."""
    if state is None and folder is not None and Path(str(folder)).is_dir():
        from peft.utils.save_and_load import load_peft_weights

        state = load_peft_weights(str(folder), device="cpu")
    if state is not None:
        check_state(model, name, state)
        return
    missing, extra = sorted(info.missing_keys), sorted(info.unexpected_keys)
    if missing or extra:
        raise CheckpointError(f"the adapter's file lacks {missing[:3]}, or has {extra[:3]} too many. Download it again")
