"""A model is run on a few tokens: before it is quantized, and before it is written.

The former shows that it can do without dense weights, the latter that it still computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.calibrate import Batch, call_of
from quadapt.errors import ConfigError
from quadapt.limits import limit_of
from quadapt.model.inputs import random_inputs
from quadapt.model.select import last_parts

TOKENS = 8
"""Length of the sequence that is run."""

SAME = 0.05
"""Relative difference of logits that comes from another order of sums; where codes are taken for weights it is 0.5."""


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    """What a model answers to token ids, which an encoder-decoder gets on both sides, or to inputs by name."""
    return answer_of(model(**call_of(model, batch, next(model.parameters()).device)))


def answer_of(output: Any) -> Tensor:
    """What a model answers: its logits; of one that gives none, the first tensor that it gives."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next(each for each in output.to_tuple() if isinstance(each, Tensor))


def check_runs(model: Any) -> Tensor:
    """Run a model on a few tokens (or on a picture, or on sound), and return what it answers.

    Raises:
        ConfigError: It cannot be run, or gives logits that are NaN or infinite.
    """
    return _tried(model)[1]


def inputs_for(model: Any, sequences: int = 1, length: int = TOKENS) -> Batch:
    """Random inputs on which a model runs.

    Raises:
        ConfigError: There are none, or it gives logits for them that are NaN or infinite.
    """
    return _tried(model, sequences, length)[0]


def _tried(model: Any, sequences: int = 1, length: int = TOKENS) -> tuple[Batch, Tensor]:
    """The first inputs on which a model runs, and what it answers."""
    first: Exception | None = None
    for batch in random_inputs(model.eval(), sequences, length):
        try:
            logits = logits_of(model, batch)
        except Exception as error:  # whatever a model's own code raises
            if limit_of(error) is not None:
                raise
            first = first or error
            continue
        if bool((logits.isnan() | (logits == torch.inf)).any()):
            raise ConfigError(
                f"{type(model).__name__} gives logits that are NaN or infinite on a few tokens. Its weights are "
                f"damaged, or {logits.dtype} is too narrow for it: try --dtype float32"
            )
        return batch, logits
    why = f"{type(first).__name__}: {' '.join(str(first).split())}" if first else "it takes neither text nor pictures"
    raise ConfigError(f"{type(model).__name__} cannot be run on tokens ({why})") from first


def check_reads(model: Any, layers: Mapping[str, nn.Linear]) -> None:
    """Check that a model computes the same when the weights of `layers` are codes.

    Some models read a layer's `weight` outside its forward: to cast activations to its dtype (T5), or to multiply with
    it (Mamba). The model is run with layers that compute as before and whose `weight` looks like codes.

    Args:
        model: Dense.
        layers: To be quantized, by full name.

    Raises:
        ConfigError: The model cannot be run, or gives something else then; the layers that it reads are named.
    """
    if getattr(model.config, "rescale_every", 0) and model.config.model_type == "rwkv":
        raise ConfigError(
            f"{type(model).__name__} divides weights of its layers when it runs (rescale_every="
            f"{model.config.rescale_every} in config.json), and codes cannot be divided. Load it with rescale_every=0"
        )
    batch, dense = _tried(model)
    with _as_codes(layers) as read:
        try:
            given = logits_of(model, batch)
            same = bool((given - dense).norm() <= SAME * dense.norm())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a product of codes with floats, or a sum over the wrong axis
            same = False
    if read and not same:
        raise ConfigError(
            f"{min(read)}: {type(model).__name__} reads the weight of this layer in code of its own, and would take "
            f"codes for weights. List all such layers under skip (--skip {' --skip '.join(last_parts(read))})"
        )


@contextmanager
def _as_codes(layers: Mapping[str, nn.Linear]) -> Iterator[set[str]]:
    """Inside, layers compute as before, and their `weight` is uint8. Gives the names of those where it was read."""
    read: set[str] = set()
    classes = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__class__ = _Codes
            layer.__dict__["on_read"] = partial(read.add, name)
        yield read
    finally:
        for name, layer in layers.items():
            layer.__class__ = classes[name]
            layer.__dict__.pop("on_read", None)


class _Codes(nn.Linear):
    """A dense layer that looks quantized."""

    on_read: Callable[[], None]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        self.on_read()
        dense = self._dense
        return torch.zeros(*dense.shape, 1, dtype=torch.uint8, device=dense.device)  # the shape of 8-bit codes

    @property
    def _dense(self) -> Tensor:
        dense = self._parameters["weight"]
        assert dense is not None
        return dense

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise TypeError("activations were cast to the dtype of codes")
        return nn.functional.linear(input, self._dense, self.bias)
