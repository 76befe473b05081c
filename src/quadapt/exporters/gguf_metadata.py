"""What llama.cpp must know of a model besides its weights: names, sizes, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from quadapt.errors import ExportError
from quadapt.exporters.gguf_rope import check_rope, head_dim, write_rope
from quadapt.importers.gguf_families import FAMILIES
from quadapt.importers.gguf_family import Family, names_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FRACTIONS = ("epsilon", "softcapping", "freq_base", "alibi", "clamp", "scale")
"""Parts of the keys whose numbers are no whole ones."""


def family_of(model: nn.Module) -> Family:
    """Find the family that a model belongs to.

    Raises:
        ExportError: It is not one that can be written, or it computes what llama.cpp would not.
    """
    class_name = type(model).__name__
    if class_name not in FAMILIES:
        raise ExportError(
            f"{class_name}: GGUF is written for {', '.join(FAMILIES)}. Use --format hf (and then llama.cpp's own "
            "converter, if llama.cpp computes such models)"
        )
    family, config = FAMILIES[class_name], text_config(model)
    for name, allowed in family.computes.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        known = (allowed(config),) if callable(allowed) else allowed
        if value not in known:
            raise ExportError(
                f"config.{name}={value!r}: llama.cpp computes {class_name} with {' or '.join(map(repr, known))}. "
                "Use --format hf"
            )
    check_rope(family, config, class_name)
    return family


def text_config(model: Any) -> Any:
    """The configuration of a model, or of its language model if it has more parts."""
    return model.config.get_text_config()


def namer(family: Family, blocks: int) -> Callable[[str], str]:
    """A function from a tensor's name in transformers to its name in GGUF.

    The function raises ExportError for a tensor that the family does not have.
    """
    known = names_of(family, blocks)

    def name_of(name: str) -> str:
        found = known(name)
        if found is None:
            raise ExportError(f"{name}: llama.cpp's {family.arch} has no such tensor. Use --format hf")
        return found

    return name_of


def write_metadata(writer: GGUFWriter, model: nn.Module, name: str, *, added: int = 0) -> list[str]:
    """Describe a model of a known family, with a number of tokens `added` to it; returns notes."""
    import gguf

    config = text_config(model)
    family = FAMILIES[type(model).__name__]
    said = {key: of(config) if callable(of) else getattr(config, of) for key, of in family.metadata.items()}
    said["vocab_size"] += added
    longest = said["context_length"]
    window = longest if family.windows else getattr(config, "sliding_window", None) or longest
    said["context_length"] = min(longest, window)
    writer.add_type("model")
    writer.add_name("Mistral" if name == "mistral" else name)  # which transformers takes for an architecture
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in said.items():
        _say(writer, f"{family.arch}.{key}", value)
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    notes = write_rope(writer, family, config)
    if any(_is_whole_gelu(module) for module in model.modules()):
        notes.append("llama.cpp computes gelu by its approximation with tanh, which is off by at most 0.0005")
    if family.besides:
        parts = " and ".join(each.rstrip(".") for each in family.besides)
        notes.append(
            f"{parts} stay out: llama.cpp has what sees in a file of its own (mmproj), which its converter makes of "
            "the original model"
        )
    if window < longest:
        notes.append(
            f"this model attends to the last {window} tokens, llama.cpp to all: they agree up to {window} tokens, and "
            f"that is the context length written (the model allows {longest})"
        )
    return notes


def _is_whole_gelu(module: nn.Module) -> bool:
    """Whether a module computes GELU itself, and not its approximation with tanh."""
    from transformers.activations import GELUActivation

    return isinstance(module, GELUActivation) or (isinstance(module, nn.GELU) and module.approximate == "none")


def _say(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write a number in the type that llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif value is not None and any(part in key for part in _FRACTIONS):
        writer.add_float32(key, float(value))
    elif value is not None:
        writer.add_uint32(key, int(value))
