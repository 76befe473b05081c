"""Finding out what kind of checkpoint a folder holds, what is in its files, and whether a model was given all of it.

transformers draws at random what a checkpoint lacks, leaves out what the model has no place for, and casts what has
another dtype; it says so in a log. Here each of these is an error: a model with one random matrix still quantizes,
trains and answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.errors import CheckpointError
from quadapt.hf.kinds import kind_of
from quadapt.hf.reading import reading
from quadapt.model.linear_form import linear_form
from quadapt.model.quantize import quantized_layers

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Files of weights: the latter are pickles, which transformers reads with `weights_only=True` (no code runs)."""

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""What earlier versions of transformers wrote beside the weights: frequencies and causal masks, made anew today."""


def auto_class(config: Any) -> Any:
    """The class of transformers that loads the model which `config.architectures` names.

    Raises:
        CheckpointError: It is none that transformers has an Auto class for, see :func:`quadapt.hf.kinds.kind_of`.
    """
    import transformers

    return getattr(transformers, kind_of(config).auto)


def skeleton(
    config: Any, *, name: str = "model", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The dense model without its weights, on the meta device, in evaluation mode, and in the linear form.

    Args:
        config: A model's configuration, as transformers reads it.
        name: What errors call the model.
        dtype: The dtype of its parameters. Default: that of the configuration.
        trust_remote_code: Run code that comes with the model.
    """
    with torch.device("meta"):
        made = auto_class(config).from_config
        model: nn.Module = reading(name, made, config, dtype=dtype, trust_remote_code=trust_remote_code)
    return linear_form(model).eval()


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder's files of weights by name, dtypes and shapes alone: on the meta device, or mapped.

    Raises:
        CheckpointError: A pickle holds anything but tensors.
    """
    from transformers.modeling_utils import load_state_dict

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:  # a pickle is mapped where it lies; only of safetensors the header is enough
            found |= load_state_dict(file, map_location="meta" if file.suffix == ".safetensors" else "cpu")
        except (UnpicklingError, EOFError, TypeError) as error:
            raise CheckpointError(
                f"{file}: is damaged, or holds more than tensors, such as code, which is not run. Convert it to "
                "safetensors where it comes from"
            ) from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files of weights in a folder: safetensors, or pickles if there are none."""
    return next((files for pattern in WEIGHTS if (files := sorted(folder.glob(pattern)))), [])


def check_loaded(model: nn.Module, info: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Check that a model was given all that it has, and has a place for all that there is.

    Args:
        model: The model that transformers has loaded.
        info: What transformers says about it (`output_loading_info=True`); tied weights, and what the model's own class
            ignores, are not in it.
        stored: `stored_tensors` of its folder; empty if they are not known.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or there is one too many; it is named.
    """
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{name}: is {_shape(found)} in the files, and {_shape(wanted)} by config.json. Either belongs to another "
            "model: copy both from one source"
        )
    if info["missing_keys"]:
        raise CheckpointError(
            f"{_several(info['missing_keys'])} not in the files, and random numbers would stand there. The copy is "
            "incomplete, or config.json belongs to another model"
        )
    unexpected = {
        name
        for name in info["unexpected_keys"]
        if not (_OLD_BUFFERS.search(name) and (name not in stored or stored[name].ndim != 1))
    }
    if unexpected:
        raise CheckpointError(
            f"{_several(unexpected)} in the files, but {type(model).__name__} has nothing of that name and would run "
            "without. config.json belongs to another model, or the model's own code is needed (--trust-remote-code)"
        )
    _check_dtypes(model, stored)


def _check_dtypes(model: Any, stored: Mapping[str, Tensor]) -> None:
    """Floats where the model has floats, and codes where it has codes: a cast would make numbers of other bits."""
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    codes = {
        f"{name}.{part}": torch.int32 if part == "perm" else torch.uint8
        for name, layer in quantized_layers(model).items()
        for part in layer.layout.shapes
    }
    for name, tensor in stored.items():
        full = name if name in state else f"{prefix}.{name}"
        if full not in state:
            continue  # stored under another name, or ignored
        if full in codes:
            fits, wanted = tensor.dtype == codes[full], str(codes[full]).removeprefix("torch.")
        elif state[full].is_floating_point():
            fits, wanted = tensor.dtype in _FLOATS, "float32, bfloat16 or float16"
        else:
            fits, wanted = not tensor.is_floating_point(), "integers"
        if not fits:
            raise CheckpointError(
                f"{name}: is {str(tensor.dtype).removeprefix('torch.')} in the files, where {wanted} belongs. The file "
                "is damaged, or was converted by something that does not know this model. Copy it from its source"
            )


def _several(names: Collection[str]) -> str:
    """`a: is`, or `a, b and 3 more: are`."""
    first = sorted(names)[:3]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return f"{', '.join(first)}{more}: {'is' if len(names) == 1 else 'are'}"


def _shape(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
