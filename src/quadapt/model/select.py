"""Which matrices of a model are quantized, and why the others are not.

Every parameter with two axes or more is either selected or listed with a reason; none is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quadapt.errors import ConfigError, ShapeError
from quadapt.nn.quant_linear import QuantLinear


@dataclass(frozen=True)
class Selection:
    """The matrices of a model, sorted out."""

    chosen: dict[str, nn.Linear]
    """Linear layers to quantize, by name."""

    left: dict[str, str]
    """Why each other matrix stays as it is, by name."""


def select(model: nn.Module, *, target_modules: Sequence[str] = (), skip: Sequence[str] = ()) -> Selection:
    """Sort out the matrices of `model`.

    Args:
        model: May be on the meta device.
        target_modules: Quantize only these: full names, or runs of their dotted parts (`q_proj`, `layers.0.mlp`).
            Empty: all.
        skip: Leave these as they are.

    Raises:
        ConfigError: A name matches nothing, or nothing is left to quantize.
        ShapeError: Some matrices are stacked experts, which cannot be quantized yet; skip them by name.
    """
    head, tied = _head(model), _tied(model)
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}" if parameter_name != "weight" else name
            if parameter.ndim < 2 or isinstance(module, QuantLinear):
                continue
            reason = _reason(module, full, head, tied, target_modules, skip)
            if reason:
                left[full] = reason
            elif parameter.ndim > 2 or not isinstance(module, nn.Linear):
                kind = (
                    f"a stack of {parameter.shape[0]} matrices (experts)"
                    if parameter.ndim > 2
                    else f"a {type(module).__name__}"
                )
                raise ShapeError(
                    f"{full}: is {kind}, which cannot be quantized yet. To leave it unquantized, list it under skip "
                    f"(--skip {full.rsplit('.', 1)[-1]})"
                )
            else:
                chosen[name] = module
    _check_names(model, [*target_modules, *skip])
    if not chosen:
        raise ConfigError(
            f"no layer is left to quantize: {len(left)} matrices are skipped. Change target_modules or skip"
        )
    return Selection(chosen, left)


def left_over(model: nn.Module, reason: str) -> dict[str, str]:
    """Why each matrix outside quantized layers is not quantized; `reason` for those that could be."""
    head, tied = _head(model), _tied(model)
    left = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not isinstance(module, QuantLinear):
                full = f"{name}.{parameter_name}" if parameter_name != "weight" else name
                left[full] = _reason(module, full, head, tied, (), ()) or reason
    return left


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is a run of the dotted parts of `name`: `q_proj` and `layers.0` match `a.layers.0.q_proj`."""
    return f".{pattern}." in f".{name}."


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match some pattern; all of them if there are no patterns.

    Raises:
        ConfigError: A pattern matches no name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(f"target_modules: {pattern!r} matches no quantized layer. There are {_kinds(names)}")
    return [name for name in names if not patterns or any(matches(name, pattern) for pattern in patterns)]


def _reason(
    module: nn.Module, name: str, head: nn.Module | None, tied: set[int], targets: Sequence[str], skip: Sequence[str]
) -> str:
    if any(matches(name, pattern) for pattern in skip):
        return "listed under skip"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module is head:
        return "output head"
    if any(id(parameter) in tied for parameter in module.parameters(recurse=False)):
        return "tied to another matrix"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if targets and not any(matches(name, pattern) for pattern in targets):
        return "not among target_modules"
    return ""


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None


def _tied(model: nn.Module) -> set[int]:
    """Identities of parameters that are registered under more than one name."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _check_names(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ConfigError(f"{pattern!r} matches no layer. The linear layers are {_kinds(linear)}")


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's decoder layers, by name, in order: the list of modules with the most linear weights.

    Raises:
        ConfigError: There is no list of modules.
    """

    def weight(item: tuple[str, nn.ModuleList]) -> int:
        linears = [module for module in item[1].modules() if isinstance(module, nn.Linear)]
        return sum(module.in_features * module.out_features for module in linears)

    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists or not weight(max(lists, key=weight)):
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks to walk through. Only decoder models are supported"
        )
    name, blocks = max(
        lists, key=weight
    )  # of nested lists the outermost wins: max keeps the first, and parents come first
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def on_meta(module: nn.Module) -> bool:
    """Whether a module's parameters are mere shapes."""
    return any(parameter.device == torch.device("meta") for parameter in module.parameters())
