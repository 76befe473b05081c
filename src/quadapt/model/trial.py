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

from quadapt.calibrate import call_of
from quadapt.errors import ConfigError
from quadapt.limits import limit_of
from quadapt.model.select import last_parts

TOKENS = 8
"""Length of the sequence that is run."""

SAME = 0.05
"""Relative difference of logits that comes from another order of sums; where codes are taken for weights it is 0.5."""


def text_ids(config: Any, sequences: int, length: int) -> Tensor:
    """Random token ids `[sequences, length]`, always the same ones, none of which stands for a picture or sound."""
    about = config.get_text_config()
    marks = {value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))}
    marks |= {value for name, value in vars(about).items() if name.endswith("token_id")}
    known = torch.tensor([each for each in range(about.vocab_size) if each not in marks] or [0])
    ids = known[torch.randint(len(known), (sequences, length), generator=torch.Generator().manual_seed(0))]
    if getattr(config, "is_encoder_decoder", False) and isinstance(config.eos_token_id, int):
        ids[:, -1] = config.eos_token_id  # where classifiers of this kind look for what they know of a text
    return ids


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a model for some token ids; an encoder-decoder gets them on both sides."""
    return answer_of(model(**call_of(model, ids, next(model.parameters()).device)))


def answer_of(output: Any) -> Tensor:
    """What a model answers: its logits; of one that gives none, the first tensor that it gives."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next(each for each in output.to_tuple() if isinstance(each, Tensor))


def check_runs(model: Any) -> Tensor:
    """Run a model on a few tokens, and return its logits.

    Raises:
        ConfigError: It cannot be run, or gives logits that are NaN or infinite.
    """
    try:
        logits = logits_of(model.eval(), text_ids(model.config, 1, TOKENS))
    except Exception as error:  # whatever a model's own code raises
        if limit_of(error) is not None:
            raise
        raise ConfigError(
            f"{type(model).__name__} cannot be run on tokens ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise ConfigError(
            f"{type(model).__name__} gives logits that are NaN or infinite on a few tokens. Its weights are damaged, "
            f"or {logits.dtype} is too narrow for it: try --dtype float32"
        )
    return logits


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
    dense = check_runs(model)
    with _as_codes(layers) as read:
        try:
            given = logits_of(model, text_ids(model.config, 1, TOKENS))
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
