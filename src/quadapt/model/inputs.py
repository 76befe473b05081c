"""Random inputs for a model of any kind: tokens, pictures, sound, as its config describes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quadapt.calibrate import Batch

_SAMPLES = 4000
"""Length of a recording in samples, where a model reads these: a quarter of a second."""


def text_ids(config: Any, sequences: int, length: int) -> Tensor:
    """Random token ids `[sequences, length]`, always the same ones, none of which stands for a picture or sound."""
    about = config.get_text_config()
    marks = set[Any]()
    for part, ends in ((config, ("token_id", "token_index")), (about, ("token_id",))):
        for value in (value for name, value in vars(part).items() if name.endswith(ends)):
            marks |= set(value) if isinstance(value, (list, tuple)) else {value}
    known = torch.tensor([each for each in range(about.vocab_size) if each not in marks] or [0])
    ids = known[torch.randint(len(known), (sequences, length), generator=_generator())]
    if getattr(config, "is_encoder_decoder", False) and isinstance(getattr(config, "eos_token_id", None), int):
        ids[:, -1] = config.eos_token_id  # where classifiers of this kind look for what they know of a text
    return ids


def random_inputs(model: Any, sequences: int, length: int) -> Iterator[Batch]:
    """Inputs that a model may take, the plainest first: text alone, pictures or sound alone, then text beside these.

    What a model needs is not always to be read off its forward: whoever asks tries them in turn.

    Args:
        model: One of transformers.
        sequences: How many sequences, pictures or recordings there are.
        length: How many tokens a sequence has.
    """
    takes, text = set(inspect.signature(model.forward).parameters), []
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    if "input_ids" in takes and getattr(model.config.get_text_config(), "vocab_size", None):
        text.append(text_ids(model.config, sequences, length))
    yield from text
    others = [
        {name: torch.randn(sequences, *shape, generator=_generator()).to(dtype)}
        for name, shape in (*_pictures(model.config), *_sounds(model.config))
        if name in takes
    ]
    for other in others:
        yield _with_decoder(model, takes, other, sequences, length)
    for ids in text:
        for other in others:
            yield {"input_ids": ids, **other}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _with_decoder(model: Any, takes: set[str], batch: dict[str, Tensor], sequences: int, length: int) -> Batch:
    """A batch for an encoder-decoder that writes text: with the text that it has written so far."""
    text = model.config.get_text_config(decoder=True)
    writes = "decoder_input_ids" in takes and getattr(text, "vocab_size", None)
    return {**batch, "decoder_input_ids": text_ids(text, sequences, length)} if writes else batch


def _parts(config: Any) -> list[Any]:
    """A config, and those of the parts that see and hear."""
    names = ("vision_config", "backbone_config", "audio_config", "encoder", "encoder_config")
    return [config, *(part for name in names if (part := getattr(config, name, None)) is not None)]


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of some entries that a config, or that of one of its parts, has."""
    found = (getattr(part, name, None) for part in _parts(config) for name in names)
    return next((each for each in found if each), default)


def _pictures(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    size = _first(config, ("image_size", "input_image_size", "img_size", "crop_size"), 224)
    if hasattr(size, "get"):
        size = [size.get("height", 224), size.get("width", 224)]
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    channels = _first(config, ("num_channels", "in_channels", "in_chans"), 3)
    frames = _first(config, ("num_frames", "frames_per_clip"), 2)
    yield "pixel_values", (channels, height, width)
    for name in ("pixel_values", "pixel_values_videos"):
        yield name, (frames, channels, height, width)


def _sounds(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    bands = _first(config, ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim"), 80)
    frames = 2 * (_first(config, ("max_source_positions",), 0) or _first(config, ("max_length",), 64) // 2)
    for name in ("input_features", "input_values"):
        yield name, (bands, frames)
        yield name, (frames, bands)
        yield name, (_SAMPLES,)
        yield name, (1, _SAMPLES)
