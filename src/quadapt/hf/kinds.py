"""What a model does, by the class that its `config.json` names: which Auto class loads it, and PEFT's word for it.

The kinds that commands work with are listed here. Every other class that transformers can load by an Auto class is
of a kind too, named after that Auto class (`zero-shot-object-detection`): such models are prepared, trained and merged
from Python.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from quadapt.errors import CheckpointError


@dataclass(frozen=True)
class Kind:
    """What some models have in common: what they read, what they give, and what loads them."""

    name: str
    """The name of the kind, as `--task` has it."""

    auto: str
    """The name of the Auto class of transformers that loads such models."""

    peft: str | None = None
    """PEFT's name of the task; None where PEFT has none, and its general model serves."""

    reads: Literal["text", "images", "else"] = "text"
    """What prepares inputs: a tokenizer, an image processor, or a processor of the model's own."""

    labels: bool = False
    """Whether what it gives are labels, which `config.json` names (`id2label`)."""

    @property
    def writes(self) -> bool:
        """Whether such a model goes on with a text, token by token."""
        return self.peft == "CAUSAL_LM"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM"),
        Kind("image-text-to-text", "AutoModelForImageTextToText", "CAUSAL_LM"),
        Kind("seq2seq", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        Kind("masked-lm", "AutoModelForMaskedLM"),
        Kind("sequence-classification", "AutoModelForSequenceClassification", "SEQ_CLS", labels=True),
        Kind("token-classification", "AutoModelForTokenClassification", "TOKEN_CLS", labels=True),
        Kind("question-answering", "AutoModelForQuestionAnswering", "QUESTION_ANS"),
        Kind("image-classification", "AutoModelForImageClassification", reads="images", labels=True),
        Kind("features", "AutoModel", reads="else"),
    )
}
"""The kinds that have a name of their own here; a class that is of several is of the first."""

_CAUSAL = ("forcausallm", "lmheadmodel")
"""How the names of classes end that are causal language models, also those that come with code of their own."""


def kind_of(config: Any) -> Kind:
    """The kind of the model that `config.architectures` names.

    Args:
        config: A model's, as transformers reads it. One that names no architecture is taken for a causal language
            model; so is one that comes with code of its own for that.

    Raises:
        CheckpointError: The class is none that transformers has an Auto class for, or the config is damaged.
    """
    named, code = getattr(config, "architectures", None) or [], getattr(config, "auto_map", None) or {}
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named) or not isinstance(code, dict):
        raise CheckpointError(
            f"config.json: architectures={named!r:.80} or auto_map={code!r:.80} is damaged. Copy it from its source"
        )
    if not named or "AutoModelForCausalLM" in code:
        return KINDS["causal-lm"]
    for name in named:
        found = _of_class(name.lower(), encodes=bool(getattr(config, "is_encoder_decoder", False)))
        if found is not None:
            return found
    own = next((kind for kind in KINDS.values() if kind.auto in code), None)
    if own is not None:
        return own
    raise CheckpointError(
        f"{', '.join(named)} is no class of transformers that one of its Auto classes loads. Give a model whose "
        "config.json names such a class under architectures, or load it yourself and give it to quadapt.prepare"
    )


def kind_of_model(model: Any) -> Kind | None:
    """The kind of a model in memory by its class, or by a class that it is derived from; None if nothing tells it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for cls in type(model).__mro__:
        found = _of_class(cls.__name__.lower(), encodes=encodes)
        if found is not None:
            return found
    return None


def peft_task(model: Any) -> str | None:
    """PEFT's name of what a model does; of a class that nobody knows, that of a causal language model if it generates.

    None where PEFT has no name for it, or where its model for the task would give more than this one takes (BLIP).
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return None
    kind = kind_of_model(model)
    if kind is None:
        return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    return kind.peft


def class_of(config: Any, kind: Kind) -> str:
    """The name of the class of transformers that a model of a family is when it is of a kind.

    Raises:
        CheckpointError: The family has none.
    """
    found = _classes(kind.auto).get(str(getattr(config, "model_type", "")))
    if not found:
        raise CheckpointError(
            f"models of the family {getattr(config, 'model_type', '?')!r} have no class for the task {kind.name} in "
            f"transformers ({kind.auto}). Use another model, or another task"
        )
    return found[0]


def _of_class(lower: str, *, encodes: bool) -> Kind | None:
    """The kind of a class by its name in lower case; `encodes` says whether the model is an encoder-decoder."""
    for kind in KINDS.values():
        if kind.auto == "AutoModelForCausalLM":
            pictures = _lower(KINDS["image-text-to-text"].auto)
            if not encodes and (lower in _lower(kind.auto) - pictures or lower.endswith(_CAUSAL)):
                return kind
        elif lower in _lower(kind.auto):
            return kind
    auto = next((auto for auto in _others() if lower in _lower(auto)), None)
    return None if auto is None else Kind(_dashed(auto), auto, reads="else", labels="Classification" in auto)


@cache
def _others() -> tuple[str, ...]:
    """Names of transformers' further Auto classes of models."""
    from transformers.models.auto import modeling_auto

    known = {kind.auto for kind in KINDS.values()} | {"AutoModelForPreTraining"}
    names = [name for name in vars(modeling_auto) if name.startswith("AutoModelFor") and name not in known]
    return (*names, "AutoModelForPreTraining")


@cache
def _classes(auto: str) -> Mapping[str, tuple[str, ...]]:
    """Names of the classes that an Auto class loads, by the family of the model."""
    import transformers

    mapping: Any = getattr(getattr(transformers, auto, None), "_model_mapping", None)
    names: Mapping[str, Any] = getattr(mapping, "_model_mapping", {})
    return {family: (each,) if isinstance(each, str) else tuple(each) for family, each in names.items()}


@cache
def _lower(auto: str) -> frozenset[str]:
    return frozenset(name.lower() for names in _classes(auto).values() for name in names)


def _dashed(auto: str) -> str:
    """`zero-shot-object-detection` for `AutoModelForZeroShotObjectDetection`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", auto.removeprefix("AutoModelFor")).lower()
