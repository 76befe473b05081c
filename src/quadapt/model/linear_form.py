"""The linear form of a model: all matrices that can be quantized are `nn.Linear`.

Two forms of transformers are brought into it, in place and without a copy: `Conv1D` (GPT-2 and its kin), which stores
its weight transposed, and experts whose matrices are stacked in one parameter. All else in quadapt then knows linear
layers alone. How such a model is written to a folder is in `hf/stored_form.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quadapt.errors import ConfigError
from quadapt.nn.experts import EveryExpert, Experts, FoldedExperts, RoutedExperts, Stack, linear_over, take_apart

_TURNED = "_layers_that_were_conv1d"
"""Attribute of a model: the names of its layers that were `Conv1D`."""

GATED = ("gate_proj", "up_proj")
"""The two matrices that are stored as one, in order: their product goes on."""


def linear_form(model: nn.Module) -> nn.Module:
    """Bring a model into the linear form, in place; one that is in it already stays as it is.

    Weights are views of the parameters that were there. What lies below an adapter stays, since the adapter was made
    for it.

    Raises:
        ConfigError: A module has a forward that is not its class's.
    """
    found = list[str]()
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer") or isinstance(module, Experts):
            continue
        known = _known(module)
        if (known or is_conv1d(module)) and "forward" in vars(module):
            raise ConfigError(
                f"{name}: something else has put a forward of its own around this {type(module).__name__} (accelerate, "
                "for a model spread over devices). Load the model to one device, or prepare it before that"
            )
        if is_conv1d(module):
            model.set_submodule(name, _turned(module))
            found.append(name)
        elif known:
            take_apart(module, *known)
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


def _gated(*, transposed: bool = False, interleaved: bool = False) -> dict[str, Stack]:
    """Two stacks: of gate and up, and of what comes after them."""
    return {
        "gate_up_proj": Stack(GATED, transposed, interleaved),
        "down_proj": Stack(("down_proj",), transposed),
    }


_KINDS: dict[str, tuple[type[Experts], dict[str, Stack]]] = {
    "Step3p7Experts": (RoutedExperts, _gated()),
    "Llama4TextExperts": (EveryExpert, _gated(transposed=True)),
    "DbrxExperts": (
        FoldedExperts,
        {
            "mlp.w1": Stack(("gate_proj",), folded=True),
            "mlp.v1": Stack(("up_proj",), folded=True),
            "mlp.w2": Stack(("down_proj",), transposed=True, folded=True),
        },
    ),
}
"""Experts of transformers that do not say how they stack, by their class: how they are run, and how they are stored."""


def _known(module: nn.Module) -> tuple[type[Experts], dict[str, Stack]] | None:
    """How the experts in a module are run, and how each stacked parameter holds them; None if it has none."""
    about: Any = module
    if all(hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_gate")):
        turned = about.is_transposed
        found = _gated(transposed=turned, interleaved=not about.is_concatenated)
        if not about.has_gate:
            found = {"up_proj": Stack(("up_proj",), turned), "down_proj": Stack(("down_proj",), turned)}
        return (RoutedExperts, found) if found.keys() <= module._parameters.keys() else None
    return _KINDS.get(type(module).__name__)
