"""Which matrices of a model are quantized, and why the others are not.

Every parameter with two axes or more is either selected or listed with a reason; none is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quadapt.errors import ConfigError, ShapeError
from quadapt.model.linear_form import linear_form
from quadapt.nn.experts import Experts
from quadapt.nn.quant_linear import QuantLinear


@dataclass(frozen=True)
class Selection:
    """The matrices of a model, sorted out."""

    chosen: dict[str, nn.Linear]
    """The linear layers to quantize, by name."""

    left: dict[str, str]
    """Why each other matrix stays as it is, by name."""


Part = Literal["auto", "text", "vision", "all"]
"""A part of a model with several towers: what reads and writes text, all else, or both; auto: the language model, where
the model says which part that is, else all of it."""


def select(
    model: nn.Module, *, target_modules: Sequence[str] = (), skip: Sequence[str] = (), part: Part = "auto"
) -> Selection:
    """Sort out the matrices of `model`, which is brought into the linear form (`linear_form.py`), in place.

    Args:
        model: May be on the meta device.
        target_modules: Quantize only these: by name, see :func:`matches`. Empty: all.
        skip: Leave these as they are.
        part: Of a model with several towers, quantize only this part.

    Raises:
        ConfigError: A name matches nothing, nothing is left to quantize, or the model is quantized by something else.
        ShapeError: Experts are stacked in a form that is not known; skip them by name.
    """
    refuse_foreign(model)
    known = _Known(linear_form(model), part)
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = _full(name, parameter_name)
            if parameter.ndim < 2 or isinstance(module, QuantLinear):
                continue
            reason = _reason(module, full, known, target_modules, skip)
            if reason:
                left[full] = reason
            elif not isinstance(module, nn.Linear):
                raise ShapeError(
                    f"{full}: is part of {type(module).__name__}, which holds experts in a form that quadapt does not "
                    f"know. To leave them unquantized, list them under skip (--skip {full.rsplit('.', 1)[-1]})"
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
    known, left = _Known(model), {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not isinstance(module, QuantLinear):
                full = _full(name, parameter_name)
                left[full] = _reason(module, full, known, (), ()) or reason
    return left


def _full(name: str, parameter: str) -> str:
    """How a parameter of a module is listed: the weight of a layer by the layer's name."""
    return name if parameter == "weight" else f"{name}.{parameter}".removeprefix(".")


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name is meant by a pattern.

    A run of the dotted parts of a name means it (`q_proj` and `layers.0` mean `a.layers.0.q_proj`), so does a regular
    expression that describes the whole name, as in PEFT, and `all-linear` means every name.

    Raises:
        ConfigError: It has signs of a regular expression, and is none.
    """
    if pattern == ALL_LINEAR or f".{pattern}." in f".{name}.":
        return True
    return bool(_SIGNS.search(pattern)) and _regular(pattern).fullmatch(name) is not None


_SIGNS = re.compile(r"[*+?^$|\\()\[\]{}]")
"""Signs that no name of a layer has, and most regular expressions."""


@cache
def _regular(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is no regular expression ({error}). Give names of layers, parts of them, a regular "
            f"expression for whole names, or {ALL_LINEAR}"
        ) from None


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match some pattern; all of them if there are no patterns.

    Raises:
        ConfigError: A pattern matches no name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(
                f"target_modules: {pattern!r} matches no quantized layer. There are {', '.join(last_parts(names))}"
            )
    return [name for name in names if not patterns or any(matches(name, pattern) for pattern in patterns)]


def refuse_foreign(model: nn.Module) -> None:
    """Raise ConfigError if a model is quantized by something else, whose codes would be taken for weights."""
    about = getattr(getattr(model, "config", None), "quantization_config", None)
    how = about.get("quant_method") if isinstance(about, Mapping) else getattr(about, "quant_method", None)
    by = str(getattr(how, "value", how or ""))  # an enum in transformers
    advice = "Load the dense model (without quantization_config), and let quadapt quantize it"
    if by and by != "quadapt":
        raise ConfigError(f"{type(model).__name__} is quantized already, by {by}. {advice}")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            continue
        tensors = [
            *module.named_parameters(recurse=False),
            *((key, each) for key, each in module.named_buffers(recurse=False) if key == "qweight"),
        ]
        for key, tensor in tensors:
            narrow = not tensor.is_floating_point() or tensor.itemsize < 2
            if (tensor.ndim >= 2 and narrow) or is_traceable_wrapper_subclass(tensor):
                found = str(tensor.dtype).removeprefix("torch.") if narrow else type(tensor).__name__
                raise ConfigError(
                    f"{name}.{key}: is {found} in a {type(module).__name__}, so something else has quantized this "
                    f"model. {advice}"
                )


class _Known:
    """What about a model says of its matrices that they stay as they are."""

    def __init__(self, model: nn.Module, part: Part = "auto") -> None:
        self.heads = {id(part) for head in heads(model).values() for part in head.modules()}
        self.tied = _tied(model)
        kept = (getattr(model, f"_keep_in_fp32_modules{suffix}", None) or () for suffix in ("", "_strict"))
        self.wide = [pattern for patterns in kept for pattern in patterns]
        self.inside, self.part = modules_of(model, part), part
        self.routers = {id(module) for module in routers(model)}


def heads(model: Any) -> dict[str, nn.Module]:
    """What makes a model's answer of its last hidden states, by name: never quantized.

    Of a language model that is its output embedding. Of others (classifiers, detectors) it is all that lies outside of
    the network that they are built upon, and the pooler of that, which pretraining for text leaves at random.
    """
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if getter is not None else None
    if isinstance(output, nn.Module):
        return {name: module for name, module in model.named_modules() if module is output}
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if not isinstance(body, nn.Module):
        return {}
    found = {name: child for name, child in model.named_children() if child is not body}
    found |= {f"{prefix}.{name}": child for name, child in body.named_children() if name == "pooler"}
    while lists := [name for name, module in found.items() if isinstance(module, nn.ModuleList)]:
        for name in lists:  # of which detectors have a head for each layer of the decoder
            found |= {f"{name}.{index}": module for index, module in found.pop(name).named_children()}
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}


def ends_of(model: Any) -> list[nn.Module]:
    """The input embedding and the output head of a model, or what it has of them."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # no model of transformers, or one with several or no embeddings
            continue
    return [each for each in found if isinstance(each, nn.Module)]


def language_model(model: Any) -> Any:
    """The part of a model that reads and writes text: all of it, unless that part can be told from its towers."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model
    text = model.get_decoder()
    return model if text is None or text is getattr(model, "base_model", None) else text


def modules_of(model: Any, part: Part) -> set[int]:
    """Identities of the modules of a part of a model.

    Raises:
        ConfigError: It has a single tower, or does not say which of its towers is that of text.
    """
    every = {id(module) for module in model.modules()}
    text = {id(module) for module in language_model(model).modules()}
    if part in ("auto", "all"):
        return every if part == "all" else text
    if text == every:  # it compares text with pictures, or knows one of them alone
        towers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _TEXT_TOWERS]
        if len(towers) != 1:
            raise ConfigError(
                f"part={part!r}: {type(model).__name__} has no towers that could be told apart. Leave it out, or take "
                "layers by name (target_modules, skip)"
            )
        text = {id(module) for module in towers[0].modules()}
    return text if part == "text" else every - text


_TEXT_TOWERS = ("text_model", "text_encoder")
"""What models that compare text with pictures call their tower of text."""


def _reason(module: nn.Module, name: str, known: _Known, targets: Sequence[str], skip: Sequence[str]) -> str:
    if any(matches(name, pattern) for pattern in skip):
        return "listed under skip"
    why = _kept(module, name, known)
    if why:
        return why
    if "continuous_position_bias_mlp" in name.split("."):  # Swin V2 asks for its first parameter, whatever that is
        return "the model's own code takes the dtype of a table from it"
    if targets and not any(matches(name, pattern) for pattern in targets):
        return "not among target_modules"
    if not isinstance(module, nn.Linear) and "Expert" not in type(module).__name__:
        return f"a parameter of {type(module).__name__}, whose own code computes with it"
    return ""


def _kept(module: nn.Module, name: str, known: _Known) -> str:
    """Why a matrix stays as it is, by what the model says of it; empty if it does not."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if id(module) in known.heads:
        return "output head"
    if id(module) not in known.inside:
        of_text = known.part == "vision"
        return "part of the language model" if of_text else "outside the language model (vision tower, projector)"
    if any(id(parameter) in known.tied for parameter in module.parameters(recurse=False)):
        return "tied to another matrix"
    if any(matches(name, pattern) or matches(f"{name}.weight", pattern) for pattern in known.wide):
        return "kept in float32 by the model's own code"
    return _of_another_kind(module) or ("router" if id(module) in known.routers else "")


def _of_another_kind(module: nn.Module) -> str:
    """What a module is that computes otherwise than a linear layer; empty if it does not."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear and type(module).__name__ not in _PLAIN:
        return f"{type(module).__name__}, a linear layer with a forward of its own"
    return ""


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that decide which experts a token is sent to, or how much each counts, with all that is in them.

    They are known by the names of their classes, and by their place: beside the experts, with an output for each, or
    one for all.
    """
    for parent in model.modules():
        experts = [each for each in parent.children() if isinstance(each, Experts)]
        if "Router" in type(parent).__name__ or "Gating" in type(parent).__name__:
            yield from parent.modules()
        if experts:
            outputs = {1, *(each.count for each in experts)}
            yield from (
                each for each in parent.children() if isinstance(each, nn.Linear) and each.out_features in outputs
            )


_PLAIN = ("FalconLinear",)
"""Subclasses of nn.Linear that compute what it does."""


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
            raise ConfigError(f"{pattern!r} matches no layer. The linear layers are {', '.join(last_parts(linear))}")


def last_parts(names: Iterable[str]) -> list[str]:
    """The last parts of some layers' names, each once."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def find_blocks(model: nn.Module, layers: Collection[str] = ()) -> dict[str, nn.Module]:
    """The blocks of a model's language model, by name, in the order in which the model holds them.

    Where `layers` are named, the blocks are those of all stacks that hold some of them, in whichever part.

    They are the items of lists of modules whose class the model names as one that is not to be split
    (`_no_split_modules`), or that transformers takes for a layer (`GradientCheckpointingLayer`); of blocks in blocks
    the outermost. A model may have several such lists: an encoder's and a decoder's. Of one that declares none, all
    outermost lists of modules with linear layers are taken; where there are none, there are no blocks.
    """
    text = set() if layers else modules_of(linear_form(model), "auto")
    kept = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    items = {
        f"{name}.{index}": item
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        and (id(stack) in text or any(layer.startswith(f"{name}.") for layer in layers))
        for index, item in stack.named_children()
        if not isinstance(item, nn.ModuleList)  # which nobody calls
        if any(isinstance(each, nn.Linear) for each in item.modules())
    }
    declared = {
        name: item
        for name, item in items.items()
        if any(cls.__name__ in kept or cls.__name__ == "GradientCheckpointingLayer" for cls in type(item).__mro__)
    }
    return _outermost(declared or items)


def _outermost(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those blocks that lie in no other, by name."""

    def parents(name: str) -> Iterator[str]:
        parts = name.split(".")
        return (".".join(parts[:count]) for count in range(1, len(parts)))

    return {name: block for name, block in blocks.items() if not any(parent in blocks for parent in parents(name))}


def on_meta(module: nn.Module) -> bool:
    """Whether a module's parameters are mere shapes."""
    return any(parameter.device == torch.device("meta") for parameter in module.parameters())
