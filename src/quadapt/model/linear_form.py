"""The linear form of a model: all matrices that can be quantized are `nn.Linear`.

Two forms of transformers are brought into it, in place and without a copy: `Conv1D` (GPT-2 and its kin), which stores
its weight transposed, and experts whose matrices are stacked in one parameter. All else in quadapt then knows linear
layers alone. How such a model is written to a folder is in `hf/stored_form.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quadapt.nn.experts import EveryExpert, Experts, RoutedExperts, Stack, linear_over, take_apart

_TURNED = "_layers_that_were_conv1d"
"""Attribute of a model: the names of its layers that were `Conv1D`."""

GATED = ("gate_proj", "up_proj")
"""The two matrices that are stored as one, in order: their product goes on."""


def linear_form(model: nn.Module) -> nn.Module:
    """Bring a model into the linear form, in place; one that is in it already stays as it is.

    Weights are views of the parameters that were there. What lies below an adapter stays, since the adapter was made
    for it.
    """
    found = list[str]()
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer") or isinstance(module, Experts):
            continue
        if is_conv1d(module):
            model.set_submodule(name, _turned(module))
            found.append(name)
        elif stacks := _stacks(module):
            take_apart(module, _KINDS[type(module).__name__][0] if _told(module) else RoutedExperts, stacks)
    if found:
        model.__dict__[_TURNED] = (*turned(model), *found)
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and "weight" in module._parameters


def _turned(module: Any) -> nn.Linear:
    made = linear_over(module.weight.T, module.bias)
    made.requires_grad_(module.weight.requires_grad)
    return made.train(module.training)


def turned(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers of a model in the linear form that were `Conv1D`, and are stored as that when dense."""
    return tuple(getattr(model, _TURNED, ()))


_KINDS: dict[str, tuple[type[Experts], bool]] = {
    "Step3p7Experts": (RoutedExperts, False),
    "Llama4TextExperts": (EveryExpert, True),
}
"""Experts of transformers that do not say how they stack, by their class: how they are run, and whether transposed."""


def _told(module: nn.Module) -> bool:
    """Whether a module's experts are among those that are known by their class."""
    return type(module).__name__ in _KINDS


def _stacks(module: nn.Module) -> dict[str, Stack]:
    """How a module's stacked parameters hold the matrices of experts, by name; empty if they do not, or are others."""
    about: Any = module
    says = all(hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_gate"))
    if not says and not _told(module):
        return {}
    turned = about.is_transposed if says else _KINDS[type(module).__name__][1]
    mixed, gated = (not about.is_concatenated, about.has_gate) if says else (False, True)
    first = Stack(GATED, turned, mixed) if gated else Stack(("up_proj",), turned)
    found = {"gate_up_proj" if gated else "up_proj": first, "down_proj": Stack(("down_proj",), turned)}
    return found if found.keys() <= module._parameters.keys() else {}
