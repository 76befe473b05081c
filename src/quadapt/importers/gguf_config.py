"""The configuration of a GGUF file's model: transformers reads a part of what a file says, and this the rest."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from quadapt.errors import CheckpointError
from quadapt.importers.gguf_families import FAMILIES
from quadapt.importers.gguf_family import Family

if TYPE_CHECKING:
    from gguf import GGUFReader

_ORIGINAL = "Give the model from which the file was made"

FREQUENCIES = "rope_freqs.weight"
"""What llama.cpp divides each rotary frequency by, which transformers does not read."""

FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""The like for LongRoPE, by their names in transformers' configurations."""

_LOW, _HIGH = 1.0, 4.0
"""`low_freq_factor` and `high_freq_factor` of all of Llama 3."""

_SCALING = {
    "none": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_context_length"},
    "longrope": {"original_context_length", "attn_factor"},
}
"""What a file says of each kind of scaling."""


def completed(reader: GGUFReader, name: str, config: Any) -> Any:
    """A copy of transformers' configuration of a file, with all that the file and its family say.

    Args:
        reader: The file.
        name: The class of its model.
        config: What transformers makes of the file. It takes a Mixtral for a Llama.

    Raises:
        CheckpointError: The file scales rotary frequencies in a way that is not known.
    """
    family, config = FAMILIES[name], _of_class(name, config)
    before, tensors = f"{family.arch}.", {each.name for each in reader.tensors}
    said = {key.removeprefix(before): of.contents() for key, of in reader.fields.items() if key.startswith(before)}
    for key, field in family.metadata.items():
        if isinstance(field, str) and key in said and key != "vocab_size":
            setattr(config, field, said[key])
    if hasattr(config, "head_dim"):
        config.head_dim = said.get("attention.key_length", config.hidden_size // config.num_attention_heads)
    for field, allowed in family.computes.items():
        if callable(allowed):
            setattr(config, field, allowed(config))
        elif getattr(config, field, None) not in allowed:
            setattr(config, field, allowed[0])
    for field, shown in family.shown.items():
        setattr(config, field, shown in tensors)
    if family.ropes:
        config.rope_parameters = _rope(reader, family, config, said)
    if (config.pad_token_id or 0) >= config.vocab_size:  # the default of the class
        config.pad_token_id = None
    return config


def _of_class(name: str, config: Any) -> Any:
    """A copy of a configuration, of the kind that models of the class `name` have."""
    import transformers

    kind = getattr(transformers, name).config_class
    if isinstance(config, kind):
        return copy.deepcopy(config)
    own = {"model_type", "architectures", "transformers_version"}
    return kind(**{key: value for key, value in config.to_dict().items() if key not in own})


def _rope(reader: GGUFReader, family: Family, config: Any, said: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding that a file says, as transformers' configuration has it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base", 10000.0))}
    rope |= _scaled(reader, said) | llama3_scaling(reader)
    if family.partial:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope["partial_rotary_factor"] = said.get("rope.dimension_count", head) / head
    if rope["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
    if "rope.freq_base_swa" not in family.metadata:
        return rope
    local = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base_swa", 10000.0))}
    return {"full_attention": rope, "sliding_attention": local}


def _scaled(reader: GGUFReader, said: dict[str, Any]) -> dict[str, Any]:
    """The scaling that a file says in its metadata."""
    start = "rope.scaling."
    scaling = {key.removeprefix(start): value for key, value in said.items() if key.startswith(start)}
    kind = scaling.pop("type", "none")
    scaling.pop("finetuned", None)  # says nothing of what is computed
    if kind not in _SCALING or scaling.keys() - _SCALING[kind]:
        raise CheckpointError(
            f"{start}type is {kind}, with {', '.join(sorted(scaling)) or 'nothing more'}; known are "
            f"{', '.join(_SCALING)}. {_ORIGINAL}"
        )
    if kind == "none":
        return {}
    names = {"original_context_length": "original_max_position_embeddings", "attn_factor": "attention_factor"}
    found: dict[str, Any] = {names.get(key, key): value for key, value in scaling.items()}
    if kind == "longrope":
        tensors = {each.name: each for each in reader.tensors}
        found |= {field: tensors[name].data.ravel().tolist() for field, name in FACTORS.items()}
    return {"rope_type": kind, **found}


def llama3_scaling(reader: GGUFReader) -> dict[str, Any]:
    """Llama 3's scaling of rotary frequencies, as transformers' configuration has it; empty if there is none.

    A file has the factor of each frequency, and not the numbers that they come of: those are found again from them.

    Raises:
        CheckpointError: The factors are not of that scaling.
    """
    tensor = next((each for each in reader.tensors if each.name == FREQUENCIES), None)
    if tensor is None:
        return {}
    factors = torch.from_numpy(tensor.data).double().flatten()
    base = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.freq_base")
    theta, half = 10000.0 if base is None else float(base.contents()), len(factors)
    waves = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    most = float(f"{float(factors.max()):.5g}")
    smooth = ((1 / factors - 1 / most) / (1 - 1 / most)).clamp(0, 1) if most > 1 else torch.ones(half)
    between = (smooth > 0.01) & (smooth < 0.99)
    reach = waves[between] * (_LOW + smooth[between] * (_HIGH - _LOW))
    length = round(float(reach.median())) if len(reach) else 0
    want = ((length / waves - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    if not length or not torch.allclose(1 / ((1 - want) / most + want), factors, rtol=1e-4):
        raise CheckpointError(f"{FREQUENCIES}: has factors that are not those of Llama 3's scaling. {_ORIGINAL}")
    return {
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": length,
    }
