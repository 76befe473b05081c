"""Adapters over experts as PEFT has them over transformers' stacks: one pair of factors for each stacked parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError
from quadapt.hf.stored_form import Stacked, stacks_of

Factors = tuple[Tensor, Tensor]
"""`A [rank, in]` and `B [out, rank]` of one layer, whose product is what is added: the scaling is in `B`."""


@dataclass(frozen=True)
class Whole:
    """The factors of a stacked parameter, as PEFT orders them."""

    stack: Stacked
    """The stacked parameter that they are over."""

    rank: int
    """The rank that each expert has."""

    A: Tensor
    """The first factors of all experts, `[experts * rank, in]`."""

    B: Tensor
    """The second factors of all experts, `[out, rank * experts]`."""


def over_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of some layers that belong to experts; names are of the base model."""
    places = tuple(f"{stack.path}." for stack in _stacks(model))
    return {name for name in names if places and name.startswith(places)}


def wholes(model: nn.Module, factors: Mapping[str, Factors]) -> dict[str, Whole]:
    """Factors of whole stacks: of each expert all its parts below each other, and zeros where it has no adapter.

    Args:
        model: The PEFT model.
        factors: Of each layer of experts that has an adapter, by name.

    Returns:
        By the names of the stacked parameters. Those of one name have one rank, in all layers.

    Raises:
        ExportError: The model stores experts without an axis for them.
    """
    ranks: dict[str, int] = {}
    stacks = [stack for stack in _stacks(model) if any(piece in factors for piece in _layers(stack))]
    for stack in stacks:
        if stack.stack.folded:
            raise ExportError(
                f"{stack.path}.{stack.name}: has no axis for experts in transformers, which PEFT's adapters over "
                "stacks need. Merge the adapter and export the model (--format hf)"
            )
        ranks[stack.name] = max(
            ranks.get(stack.name, 0), sum(_rank(stack, part, factors) for part in stack.stack.parts)
        )
    return {f"{stack.path}.{stack.name}": _whole(model, stack, factors, ranks[stack.name]) for stack in stacks}


def _stacks(model: Any) -> list[Stacked]:
    """The stacks of weights of the base model."""
    return [stack for stack in stacks_of(model.get_base_model()) if stack.leaf == "weight"]


def _layers(stack: Stacked) -> list[str]:
    """The names of the layers whose weights are views into a stack."""
    return [piece.removesuffix(".weight") for piece in stack.pieces()]


def _rank(stack: Stacked, part: str, factors: Mapping[str, Factors]) -> int:
    """The largest rank that a layer of this name has in any expert."""
    names = [name for name in _layers(stack) if name.endswith(f".{part}") and name in factors]
    return max((len(factors[name][0]) for name in names), default=0)


def _whole(model: Any, stack: Stacked, factors: Mapping[str, Factors], rank: int) -> Whole:
    module: Any = model.get_base_model().get_submodule(stack.path)
    firsts, seconds = list[Tensor](), list[Tensor]()
    for expert in range(stack.count):
        first, second, start = list[Tensor](), list[Tensor](), 0
        for part in stack.stack.parts:
            layer: Any = getattr(module[expert], part)
            none = torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)
            A, B = factors.get(f"{stack.path}.{expert}.{part}", none)
            first.append(A.float().cpu())
            second.append(nn.functional.pad(B.float().cpu(), (start, rank - start - B.shape[1])))
            start += len(A)
        firsts.append(nn.functional.pad(torch.cat(first), (0, 0, 0, rank - start)))
        seconds.append(stack.stack.whole(second))
    if stack.stack.transposed and not getattr(module, "is_transposed", False):  # then PEFT does not know that it is
        firsts, seconds = [each.T for each in seconds], [each.T for each in firsts]
    return Whole(stack, rank, torch.cat(firsts), torch.stack(seconds, -1).flatten(1))


def tensors_over(found: Mapping[str, Whole]) -> dict[str, Tensor]:
    """The tensors of an adapter's file; PEFT's wrapper of a module's last stack lies around those of the others."""
    by_path: dict[str, list[Whole]] = {}
    for whole in found.values():
        by_path.setdefault(whole.stack.path, []).append(whole)
    tensors = dict[str, Tensor]()
    for path, inside in by_path.items():
        for at, whole in enumerate(inside):
            place = ".".join(["base_model.model", path, *["base_layer"] * (len(inside) - 1 - at)])
            tensors |= {f"{place}.lora_A.weight": whole.A, f"{place}.lora_B.weight": whole.B}
    return tensors


def name_stacks(config: Any, model: Any, found: Mapping[str, Whole], adapter_name: str) -> None:
    """Let a config name stacks and their rank where it names layers of experts, in place.

    Args:
        config: PEFT's, of the adapter that goes out.
        model: The PEFT model.
        found: What :func:`wholes` gives.
        adapter_name: Which adapter.

    Raises:
        ExportError: PEFT would take layers beside the experts for experts, by their names.
    """
    from peft.tuners.lora.layer import LoraLayer

    names = {
        name.removeprefix("base_model.model.")
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.r
    }
    experts = over_experts(model, names)
    config.target_modules, config.target_parameters = sorted(names - experts) or None, sorted(found)
    config.lora_dropout = 0.0  # which PEFT does not have over stacks, and nobody needs who does not train
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {name: value for name, value in getattr(config, field).items() if name not in experts})
    for whole in found.values():
        place = rf".*\.{whole.stack.path.rpartition('.')[2]}\.{whole.stack.name}"
        config.rank_pattern[place] = whole.rank
        config.alpha_pattern[place] = whole.rank**0.5 if config.use_rslora else whole.rank
    _refuse_mistaken(config, model)


def _refuse_mistaken(config: Any, model: Any) -> None:
    """Raise ExportError if PEFT translates names of layers that are no experts into names of stacks."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert

    seen = copy.deepcopy(config)
    getattr(convert, "__wrapped__", convert)(seen, model=model.get_base_model(), conversions=None)
    lost = set(config.target_modules or ()) - set(seen.target_modules or ())
    if lost:
        raise ExportError(
            f"{min(lost)}: has the name of an expert's layer, and PEFT would put its adapter over the experts. Merge "
            "the adapter and export the model (--format hf)"
        )
