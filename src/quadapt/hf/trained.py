"""What a PEFT model trains besides the adapters over quantized layers, and how that becomes part of the base.

Stock LoRA over dense layers (head, embeddings, layers that were skipped), rows of single tokens
(`trainable_token_indices`), whole modules (`modules_to_save`), and parameters of the base that train where they are
(`bias="all"`). PEFT merges the first two; the third takes the place of the original; the last needs nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from quadapt.errors import MergeError
from quadapt.hf.also import settle
from quadapt.hf.peft_layer import QuantLoraLinear
from quadapt.model.select import ends_of
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.weight import hash_tensor

MOST_ROWS = 128
"""Rows of an embedding that trained as a whole whose tokens are added to a probe: those that moved most."""

MOST_NAMED = 4
"""Parts of one kind that are named one by one."""

Adapting = BaseTunerLayer | AuxiliaryTrainingWrapper
"""Whatever of PEFT's stands in the place of a layer."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that trained besides the adapters over quantized layers."""

    name: str
    """The name of the layer, or of the parameter, in the base model."""

    kind: str
    """What trained: LoRA over a dense weight, token rows, a whole module (`modules_to_save`), a parameter."""

    exact: bool
    """Whether the base holds it without rounding once it is merged."""

    untied: bool = False
    """Whether the merge has given it a weight of its own where there was one for two layers."""


def listed(parts: Sequence[Part]) -> str:
    """Parts in words: of many of one kind the first few, and how many there are."""
    by_kind: dict[tuple[str, bool], list[str]] = {}
    for part in parts:
        by_kind.setdefault((part.kind, part.untied), []).append(part.name)
    words = []
    for (kind, untied), names in by_kind.items():
        what = f"{kind}{', untied' if untied else ''}"
        few = len(names) <= MOST_NAMED
        more = f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more, each {what}"
        words += [f"{name} ({what})" for name in names] if few else [more]
    return "; ".join(words)


def adapting(model: nn.Module) -> dict[str, Adapting]:
    """PEFT's layers and wrappers other than ours, by name, with none that lie inside another's adapters."""
    found: dict[str, Adapting] = {}
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(closed) and closed:
            continue
        if isinstance(module, QuantLoraLinear):
            closed += (f"{name}.",)
        elif isinstance(module, ModulesToSaveWrapper):
            found[name] = module
            closed += (f"{name}.",)
        elif isinstance(module, BaseTunerLayer):
            found[name] = module
    return found


def parts_of(model: Any) -> list[Part]:
    """All that trains, or has trained, besides the adapters over quantized layers.

    Raises:
        MergeError: Some of it cannot become part of the base; the layer is named.
    """
    parts = []
    for name, module in adapting(model).items():
        active = _active(module)
        if not active:
            continue
        if isinstance(module, ModulesToSaveWrapper):
            kind, exact = "a whole module", True
        elif isinstance(module, TrainableTokensLayer):
            kind, exact = f"{sum(len(module.token_indices[each]) for each in active)} token rows", True
        else:
            assert isinstance(module, nn.Module)
            if isinstance(module.get_base_layer(), QuantLinear):
                raise MergeError(
                    f"{plain(name)}: carries {_tuner(module)}, which cannot merge into codes. "
                    "Use LoRA or an adapter of quadapt's (quadapt.prepare)"
                )
            kind, exact = f"{_tuner(module)} over a dense weight", False
        parts.append(Part(name=plain(name), kind=kind, exact=exact))
    return parts + [Part(name=plain(name), kind="a parameter of the base", exact=True) for name in _in_place(model)]


def _tuner(module: Any) -> str:
    """The name of the PEFT method that a layer is of."""
    name = type(module).__module__.split(".")[-2]
    return {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.get(name, name)


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module._get_available_adapters()]


def plain(name: str) -> str:
    """The name that a module or parameter has without PEFT's wrapping."""
    name = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name.removeprefix("base_model.model."))
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)


def _in_place(model: Any) -> list[str]:
    """Parameters of the base that train where they are: with `bias="all"`, or since someone has unfrozen them."""
    inside = tuple(
        f"{name}.{part}."
        for name, module in model.named_modules()
        if isinstance(module, Adapting)
        for part in (*module.adapter_layer_names, *module.other_param_names)
    )
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", ())
    active = () if callable(active) else active  # transformers' method of that name: PEFT's model of it is not given
    how = {configs[name].bias for name in active if hasattr(configs[name], "bias")}
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = []
    for name, parameter in model.named_parameters():
        if inside and name.startswith(inside):
            continue
        bias = (
            name.endswith(".bias")
            and ".original_module." not in name
            and ("all" in how or ("lora_only" in how and bool(adapted) and name.startswith(adapted)))
        )
        if parameter.requires_grad or bias:
            found.append(name)
    return found


def check_state(model: Any) -> None:
    """Raise MergeError if adapters are merged already, or switched off: what is trained and what runs would differ."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise MergeError(
                f"{plain(name)}: {', '.join(module.merged_adapters)} is merged already (merge_adapter). Undo that "
                "first: model.unmerge_adapter()"
            )
        if isinstance(module, Adapting) and module.disable_adapters and _active(module):
            raise MergeError(
                f"{plain(name)}: its adapters are switched off. Switch them on first: model.enable_adapter_layers() of "
                "PEFT's tuner, model.base_model"
            )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model alone; what trains in the base itself, such as its biases, stays as trained."""
    before = [(each, each._disable_adapters) for each in model.modules() if isinstance(each, Adapting)]
    try:
        for module, _ in before:
            module._disable_adapters = True
        yield
    finally:
        for module, off in before:
            module._disable_adapters = off


@torch.no_grad()
def merge_parts(model: Any) -> None:
    """Merge all parts, all of them or none; in the place of PEFT's layers and wrappers are then plain ones.

    Adapters over quantized layers stay. Each layer gets a weight of its own, see :func:`settle_ties`.

    Raises:
        MergeError: PEFT cannot merge something; the layer is named, and the model is as it was.
    """
    layers = {
        name: module
        for name, module in adapting(model).items()
        if isinstance(module, BaseTunerLayer) and _active(module)
    }
    before = [
        (owner, key, parameter, parameter.data)
        for layer in layers.values()
        for owner in layer.get_base_layer().modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    ]
    _refuse_ties(model, layers)
    at = ""
    try:
        for owner, key, parameter, data in before:
            owner._parameters[key] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for name, layer in layers.items():
            at = plain(name)
            if not layer.merged:
                layer.merge(safe_merge=True)  # out of place, and NaN is an error
    except Exception as error:  # whatever PEFT, or a tuner of its, raises
        for owner, key, parameter, data in before:
            parameter.data = data
            owner._parameters[key] = parameter
        for layer in layers.values():
            layer.merged_adapters.clear()
        reason = " ".join(str(error).split())
        raise MergeError(f"{at}: cannot merge: {reason}") from error
    _unwrap(model)


def _unwrap(model: Any) -> None:
    """Put the layers below PEFT's own layers and wrappers in their place."""
    done: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if not isinstance(module, Adapting) or (done and name.startswith(done)):
            continue
        done += (f"{name}.",)
        if isinstance(module, QuantLoraLinear):
            continue
        how = getattr(module, "unload_and_optionally_merge_module", None)
        inner = module.get_base_layer() if how is None else how(merge=False, safe_merge=False, adapter_names=None)
        if isinstance(module, ModulesToSaveWrapper) and isinstance(inner, nn.Linear):
            inner.out_features, inner.in_features = inner.weight.shape  # which PEFT swaps in tied heads
        model.set_submodule(name, inner)
    settle(model)


def _refuse_ties(model: Any, layers: dict[str, Any]) -> None:
    """Weights of input and output embeddings may come apart; `config.json` has a switch for these alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = {id(innermost(each)) for each in ends_of(base)}
    ours = {id(layer.get_base_layer()) for layer in layers.values()}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    for holders in owners.values():
        changed = [name for name, module in holders if id(module) in ours]
        others = [name for name, module in holders if id(module) not in ours | ends]
        if changed and others:
            raise MergeError(
                f"{plain(changed[0])}: shares its weight with {plain(others[0])}, which has no adapter; merged they "
                "would differ, and such a model cannot be saved. Train both, or neither"
            )


def innermost(module: Any) -> nn.Module:
    """The module below PEFT's layers and wrappers."""
    while isinstance(module, Adapting):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def settle_ties(model: Any, parts: list[Part]) -> list[Part]:
    """After a merge: embeddings that are equal share one weight again, those that came apart are declared untied."""
    apart = set()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for target, source in dict((tied and getattr(model, "all_tied_weights_keys", None)) or {}).items():
        one, other = model.get_parameter(target), model.get_parameter(source)
        owner, _, leaf = target.rpartition(".")
        if one is other:
            continue
        if one.shape == other.shape and torch.equal(one, other):
            model.get_submodule(owner).register_parameter(leaf, other)
            continue
        del model.all_tied_weights_keys[target]
        apart |= {owner, source.rpartition(".")[0]}
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return [replace(part, untied=True) if part.name in apart else part for part in parts]


def changed_besides(model: nn.Module, parts: Sequence[Part]) -> str:
    """SHA-256 of what this merge, and those before it, have changed outside of the quantized layers; empty if nothing.

    It is part of the fingerprint: an adapter trained over the merged model is not one of the base, even if no quantized
    layer differs.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    before: str = getattr(config, "besides", "")
    if not parts:
        return before
    changed, state = {part.name for part in parts}, hashlib.sha256(before.encode())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        where = plain(name)
        if where in changed or where.rpartition(".")[0] in changed:
            state.update(where.encode())
            hash_tensor(state, parameter.detach())
    return state.hexdigest()


def trained_tokens(model: Any) -> list[int]:
    """Token ids whose embedding trained: all rows that trained singly, or those that moved most of a whole matrix."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = {id(innermost(each)) for each in ends_of(base)}
    tokens: set[int] = set()
    for module in adapting(model).values():
        active = _active(module)
        if not active or id(innermost(module)) not in ends:
            continue
        if isinstance(module, TrainableTokensLayer):
            tokens |= {int(token) for name in active for token in module.token_indices[name]}
        elif isinstance(module, ModulesToSaveWrapper):
            tokens |= _moved_most(_change_of(module, active[0]))
        factors: Any = getattr(module, "lora_embedding_A", {})
        for name in active:
            if name in factors:
                tokens |= _moved_most(factors[name].detach().float().square().sum(0))
    return sorted(tokens)


def _change_of(module: ModulesToSaveWrapper, name: str) -> Tensor:
    """How far each row of a module's weight has moved."""
    now = module.modules_to_save[name].get_parameter("weight")
    return (now.detach().float() - module.original_module.weight.detach().float()).square().sum(1)


def _moved_most(moves: Tensor) -> set[int]:
    found = moves.topk(min(MOST_ROWS, len(moves)))
    return {int(at) for at, move in zip(found.indices, found.values, strict=True) if move > 0}
