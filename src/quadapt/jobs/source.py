"""What the commands share: where a model comes from, what identifies it, on which device to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import quadapt
from quadapt.config import ChatConfig, EvalConfig, Machine, ServeConfig, TuneConfig, Walk
from quadapt.errors import CheckpointError, ConfigError, ResourceError
from quadapt.hf.folder import Folder, open_folder
from quadapt.hf.kinds import Kind
from quadapt.hf.loading import load
from quadapt.importers import IMPORTERS

Asked = ChatConfig | EvalConfig | ServeConfig
"""Settings that name a model to load: a folder, an adapter with its base, a file."""


class Place(NamedTuple):
    """The two devices that take part when a dense model is worked through."""

    device: str
    """The device that computes, by its name in torch."""

    home: str
    """The device that holds the model: the one that computes, or the CPU."""


def device_of(config: Machine) -> str:
    """Choose the device that a command computes on.

    Raises:
        ConfigError: It does not exist here, or it is the CPU and the model is to be kept off a GPU.
    """
    device = _device_of(config)
    if device == "cpu" and isinstance(config, Walk) and config.offload != "auto":
        raise ConfigError(
            f"offload={config.offload!r} says where the model is while a GPU works, and device={config.device!r} is "
            "the CPU here. Leave it out, or name a GPU (--device cuda)"
        )
    return device


def load_as_asked(config: Asked) -> tuple[Any, Any]:
    """The model that a command was given, and its tokenizer or processor, on the device and in the dtype asked for."""
    return load(
        config.model,
        dtype=config.dtype,
        device=device_of(config),
        base=config.base,
        any_base=config.any_base,
        trust_remote_code=config.trust_remote_code,
    )


def _device_of(config: Machine) -> str:
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if config.device == "auto":
        return "cuda" if available is not None and available.type == "cuda" else "cpu"
    try:
        device_type = torch.device(config.device).type
    except RuntimeError:
        raise ConfigError(f"device={config.device!r} is unknown. Use auto, cpu, cuda or cuda:N") from None
    if device_type != "cpu" and (available is None or available.type != device_type):
        raise ConfigError(f"device={config.device!r} is not available here. Use cpu or auto")
    return config.device


@contextmanager
def within_memory(place: Place) -> Iterator[None]:
    """Turn what torch raises when a GPU is full into a ResourceError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        apart = place.home != place.device
        raise ResourceError(
            f"{place.device} is out of memory{', though it holds one block at a time' if apart else ''}. Use "
            f"{'' if apart else '--offload cpu, '}a smaller --calibration-length, fewer --calibration-sequences (8 go "
            "through at once), or --device cpu. The same command goes on with the blocks that are finished"
        ) from error


def dense_folder(name: str) -> Folder:
    """Open the folder of a dense model that is to be quantized.

    Raises:
        CheckpointError: It is quantized already, or an adapter, or not there.
    """
    folder = open_folder(name)
    if folder.kind == "quantized":
        raise CheckpointError(
            f"{name!r} is quantized already. Give the dense model, or go on with it: quadapt tune {name}"
        )
    if folder.kind == "adapter":
        raise CheckpointError(f"{name!r} is an adapter. Merge it first: quadapt merge {name} --output FOLDER")
    return folder


def check_writes(kind: Kind | None, name: str, command: str) -> None:
    """Check that models of a kind go on with a text, as causal language models do.

    Raises:
        ConfigError: They do something else, which the command has no use for.
    """
    if kind is not None and not kind.writes:
        raise ConfigError(
            f"{name!r} is a model for {kind.name}, and quadapt {command} needs one that goes on with a text. From "
            "Python: quadapt.load, quadapt.prepare"
        )


def teacher_name(config: TuneConfig, source: str | None) -> str:
    """Where the teacher is: as was said, or else the full-precision model.

    Args:
        config: The settings.
        source: The dense model that is tuned, or that the tuned one was made of; None or empty if nobody knows.

    Raises:
        CheckpointError: It is no dense model, or not there.
        ConfigError: Nobody has said, and what the model was made of is not known.
    """
    name = config.teacher or source
    if not name:
        raise ConfigError(
            f"objective={config.spec.method.objective.name!r} needs a teacher: the full-precision model, or one that "
            "was tuned. Say where it is with --teacher"
        )
    return dense_folder(name).name


def not_read(name: str, config: Any) -> str:
    """Why a model is refused that others have quantized in a format which is not read; empty if it is none."""
    about = getattr(config, "quantization_config", None)
    if not isinstance(about, dict) or about.get("quant_method") == "quadapt":
        return ""
    return (
        f"{name!r} is quantized already, by {about.get('quant_method')}, which cannot be read. What can is "
        f"{', '.join(IMPORTERS)}. Give the dense model"
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import peft
    import transformers

    return {
        "quadapt": quadapt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
