"""What can train beside adapters because it is stored as floats: norms, biases, embeddings and the head.

All of it is trained in float32, and computed with in the dtype that the model is stored in: each forward rounds, and
the gradient goes straight through. So a merge, which stores the rounded numbers, is exact. PEFT holds whole modules
under `modules_to_save`, and biases where they are (`bias="all"`, so that they stay as trained while adapters are
off); its files, loaders and merges serve both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from quadapt.errors import ConfigError
from quadapt.model.select import Part, ends_of, heads, modules_of
from quadapt.nn.quant_linear import QuantLinear

log = logging.getLogger("quadapt")

HALF = (torch.bfloat16, torch.float16)
"""Dtypes in which small steps would be lost."""


# --- what there is ----------------------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: it holds parameters, and its class is called so (RMSNorm, LayerNorm, ..)."""
    own, name = list(module.parameters()), type(module).__name__
    if not own or any(module.children()) or "Norm" not in name:
        return False
    return name.endswith("Norm") or all(parameter.ndim == 1 for parameter in own)


def _modules(model: Any, part: Part) -> dict[str, nn.Module]:
    """The modules of a part of a model, with the model's heads, by name."""
    wanted = modules_of(model, part) | {id(module) for head in heads(model).values() for module in head.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def _norms(model: Any, part: Part = "auto") -> list[str]:
    return [name for name, module in _modules(model, part).items() if is_norm(module)]


def _biases(model: Any, part: Part = "auto") -> list[str]:
    return [
        f"{name}.{own}"
        for name, module in _modules(model, part).items()
        for own, _ in module.named_parameters(recurse=False)
        if own == "bias"
    ]


def _embeddings(model: Any) -> list[str]:
    found = [each for each in ends_of(model) if isinstance(each, nn.Embedding)]
    return [name for name, each in model.named_modules() if any(each is one for one in found)]


def _heads(model: Any) -> list[str]:
    return list(heads(model))


ROLES: dict[str, Callable[[Any, Part], list[str]]] = {
    "norms": _norms,
    "biases": _biases,
    "embeddings": lambda model, _: _embeddings(model),
    "head": lambda model, _: _heads(model),
}
"""What can be asked for: the names of the modules (for biases, of the parameters) that train then."""


@dataclass(frozen=True)
class Also:
    """What trains beside an adapter, in PEFT's words."""

    modules: tuple[str, ...] = ()
    """Modules that train whole, by their full names."""

    biases: tuple[nn.Parameter, ...] = ()
    """Biases that train where they are."""

    tied: bool = False
    """Whether embedding and head are one matrix, and trains as one."""

    def configure(self, settings: Any) -> None:
        """Ask PEFT for it, in the config of an adapter."""
        if not (self.modules or self.biases):
            return
        settings.modules_to_save = list(self.modules) or None
        settings.bias = "all" if self.biases else "none"
        settings.ensure_weight_tying = self.tied
        if self.tied:
            settings.modules_to_tie = settings.target_modules_to_tie = None


def also(model: Any, roles: Sequence[str], tokens: Sequence[int] = (), part: Part = "auto") -> Also:
    """Find what is to train beside the adapters.

    The head of a model that is no language model (a classifier's, a detector's) trains whatever `roles` say: it is made
    for its labels, and often drawn at random.

    Args:
        model: The base, without adapters.
        roles: Of :data:`ROLES`.
        tokens: Tokens whose rows are to train singly.
        part: The part of the model in which norms and biases are looked for.

    Raises:
        ConfigError: The model has nothing of a role, or holds it in codes, or two wishes contradict each other.
    """
    found = {role: ROLES[role](model, part) for role in roles}
    own = [] if "head" in found or model.get_output_embeddings() is not None else _alone(model, _heads(model))
    for role, names in found.items():
        if not names:
            there = ", ".join(each for each, names_of in ROLES.items() if names_of(model, part))
            raise ConfigError(
                f"train_also={role!r}: {type(model).__name__} has no {role}. It has {there}. Leave {role} out"
            )
    ends = [name for role in ("embeddings", "head") for name in found.get(role, ())]
    if ends and tokens:
        raise ConfigError(
            "train_tokens trains single rows of embedding and head, and train_also all of them. Leave one out"
        )
    for name in ends:
        if isinstance(model.get_submodule(name), QuantLinear) or not _floats(model.get_submodule(name)):
            raise ConfigError(f"train_also: {name} is quantized, and codes do not train. Leave it out of train_also")
    tied = bool(ends) and _are_tied(model)
    if tied:
        ends = _embeddings(model)
        log.warning("embedding and head are one matrix (tied), and train as one")
        known = {name.rpartition(".")[2] for name in (*ends, *_heads(model))}
        if not known <= set(EMBEDDING_LAYER_NAMES):
            raise ConfigError(
                f"train_also: {', '.join(sorted(known))} are one matrix (tied), and PEFT does not keep layers of these "
                "names tied while they train. Leave embeddings and head out"
            )
    modules = dict.fromkeys([*found.get("norms", ()), *ends, *own])
    for name in _meant_too(model, list(modules)):
        raise ConfigError(f"train_also: PEFT tells modules by how their names end, and would train {name} too")
    biases = [model.get_parameter(name) for name in found.get("biases", ())]
    return Also(tuple(modules), tuple(biases), tied)


def _alone(model: Any, names: Sequence[str]) -> list[str]:
    """Those of some modules that PEFT can train without another whose name ends alike; the others stay as they are."""
    kept = list(names)
    for name in names:
        others = _meant_too(model, [name])
        if set(others) - set(names):
            kept.remove(name)
            log.warning("%s stays as it is: PEFT, which goes by how names end, would train %s too", name, others[0])
    return kept


def _meant_too(model: Any, names: Sequence[str]) -> list[str]:
    """Further modules that PEFT, which goes by how names end, would take for some of these."""
    every = (name for name, _ in model.named_modules() if name not in names)
    return [name for name in every if name.endswith(tuple(names))]


def _floats(module: nn.Module) -> bool:
    return all(parameter.is_floating_point() for parameter in module.parameters())


def _are_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


# --- training in float32 what is stored in less -----------------------------------------------------------------------


class Narrowing:
    """Mixed into the class of a module: parameters that train in float32 are rounded to their stored dtype in forward.

    The gradient of a rounding is that of the cast: it goes straight through, and reaches the parameter in float32.
    """

    stored: dict[str, tuple[torch.dtype, torch.dtype]]
    """The dtype in which each such parameter is stored, and that in which it is computed with, by its own name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with the rounded parameters."""
        parameters: dict[str, Any] = self._parameters  # type: ignore[attr-defined] # of the module
        before = {name: parameters[name] for name in self.stored}
        try:
            parameters.update({name: narrowed(wide, self.stored[name]) for name, wide in before.items()})
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            parameters.update(before)


def narrowed(wide: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """A parameter as it is stored, in the dtype of the computation."""
    stored, computed = dtypes
    return wide.to(stored).to(computed)


@cache
def _narrowing(cls: Any) -> type:
    return type(f"Narrowing{cls.__name__}", (Narrowing, cls), {})


def _narrow(module: Any) -> Any:
    """Make a module one that narrows, if it is not."""
    if not isinstance(module, Narrowing):
        module.stored, module.__class__ = {}, _narrowing(type(module))  # type: ignore[arg-type] # a class
    return module


def stored_bias(layer: Any) -> Tensor | None:
    """The bias of a linear layer as it is stored, whatever it trains in; None if there is none."""
    bias: Tensor | None = layer.bias
    stored = layer.stored.get("bias") if isinstance(layer, Narrowing) else None
    return bias if bias is None or stored is None else narrowed(bias, stored)


def besides(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """What trains in whole modules of PEFT's, and biases that train where they are: owner, own name and parameter."""
    for where, parameter in model.named_parameters(remove_duplicate=False):
        parts = where.split(".")
        if not parameter.requires_grad or any(part.startswith("lora_") for part in parts):
            continue
        if "modules_to_save" in parts or parts[-1] == "bias":
            yield model.get_submodule(".".join(parts[:-1])), parts[-1], parameter


def optimized(model: nn.Module) -> dict[int, bool]:
    """Whether weight decay acts on what trains beside adapters, by the id of the parameter: not on norms and biases."""
    return {id(parameter): not (name == "bias" or is_norm(owner)) for owner, name, parameter in besides(model)}


def widen(model: nn.Module, found: Also, stored: torch.dtype | None = None) -> None:
    """Let train in float32 what trains beside adapters, and freeze biases that PEFT has unfrozen elsewhere.

    Args:
        model: A PEFT model.
        found: What was asked for, as it was found in the base.
        stored: The dtype of the base on disk; by default that of the base in memory.
    """
    asked, wide = {id(parameter) for parameter in found.biases}, dict[int, nn.Parameter]()
    for owner, name, parameter in list(besides(model)):
        if id(parameter) not in asked and not _saved(model, owner):
            parameter.requires_grad_(False)
        elif (stored or parameter.dtype) in HALF:
            _narrow(owner).stored[name] = (stored or parameter.dtype, parameter.dtype)
            owner._parameters[name] = wide.setdefault(id(parameter), nn.Parameter(parameter.detach().float()))


def _saved(model: nn.Module, owner: nn.Module) -> bool:
    """Whether a module is one of those that PEFT trains and saves whole."""
    wrappers = (each.modules_to_save for each in model.modules() if isinstance(each, ModulesToSaveWrapper))
    return any(owner is inner for copies in wrappers for inner in copies.modules())


def settle(model: nn.Module) -> None:
    """Store what has trained in float32 in the dtype of the model again; tied parameters stay tied."""
    narrow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, Narrowing):
            continue
        for name, dtypes in module.stored.items():
            wide: Any = module._parameters[name]
            kept = nn.Parameter(narrowed(wide.detach(), dtypes), requires_grad=wide.requires_grad)
            module._parameters[name] = narrow.setdefault(id(wide), kept)
        del module.stored
        module.__class__ = type(module).__mro__[2]
