"""Statistics of a model's inputs, gathered block by block.

The walk keeps one set of hidden states. At each block it runs the block on them as the model would, lets the caller
quantize the block's layers stage by stage, and runs the then quantized block to get the next hidden states. So every
layer is calibrated on what it will really see: the outputs of quantized layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.errors import CalibrationError
from quadapt.nn.block_ap import Example

Batch = Tensor
"""Token ids `[sequences, length]`, without padding."""


Gathered = tuple[list[str], Tensor]
"""Layers that share their input, and its second moment, float64 `[in, in]`."""


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, and passes the hidden states on unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.inputs: list[Tensor] = []
        for name, value in vars(
            block
        ).items():  # models read some of a block's attributes (attention_type) before calling it
            if not name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
                self.__dict__.setdefault(name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs.append(hidden_states)
        self.calls.append({"args": args, "kwargs": kwargs})
        return hidden_states


class BlockWalk:
    """The hidden states of some batches on their way through a model's blocks.

    Args:
        model: A causal language model in evaluation mode, on one device.
        blocks: Its blocks by name, in order (`model.select.find_blocks`).
        batches: Token ids to calibrate on.

    Raises:
        CalibrationError: There are no batches, or the model does not call its blocks once each, in order.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
        if not batches:
            raise CalibrationError("there is no calibration data")
        recorders = {name: _Recorder(block) for name, block in blocks.items()}
        with torch.no_grad(), _replaced(model, recorders):
            for batch in batches:
                model(input_ids=batch, use_cache=False)
        counts = {len(recorder.calls) for recorder in recorders.values()}
        if counts != {len(batches)}:
            raise CalibrationError(
                f"{type(model).__name__} does not call each of its blocks once. It cannot be calibrated; "
                "use --rounding nearest"
            )
        self._calls = {name: recorder.calls for name, recorder in recorders.items()}
        self._hidden = self._dense = next(iter(recorders.values())).inputs

    @torch.no_grad()
    def _run(self, name: str, block: nn.Module, states: list[Tensor]) -> list[Tensor]:
        """Outputs of a block for some hidden states, batch by batch."""
        outputs = []
        for hidden, call in zip(states, self._calls[name], strict=True):
            output = block(hidden, *call["args"], **call["kwargs"])
            outputs.append(output if isinstance(output, Tensor) else output[0])
        return outputs

    def advance(self, name: str, block: nn.Module) -> None:
        """Move the hidden states past a block, as it now is."""
        self._hidden = self._run(name, block, self._hidden)

    def advance_dense(self, name: str, block: nn.Module) -> None:
        """Move a second set of hidden states, those of the dense model, past a block that is still dense."""
        self._dense = self._run(name, block, self._dense)

    def advance_and_gather(self, name: str, block: nn.Module, layers: Mapping[str, nn.Module]) -> list[Gathered]:
        """Move the hidden states past a block, and gather the second moments of its layers' inputs on the way.

        Returns:
            For each group of layers that share their input: their names, and the moment as :meth:`second_moment`.
        """
        stages = self.stages(name, block, layers)
        moments = [_Moment() for _ in stages]
        with _hooks({layers[stage[0]]: moment for stage, moment in zip(stages, moments, strict=True)}):
            self.advance(name, block)
        return [(stage, moment.mean()) for stage, moment in zip(stages, moments, strict=True)]

    def examples(self, name: str, size: int) -> list[Example]:
        """What a block receives, and what the dense one gave (:meth:`advance_dense` has been called), `size` at a time.

        Sequences of one batch stand together; the last of a batch may be fewer.
        """
        found = []
        for hidden, call, target in zip(self._hidden, self._calls[name], self._dense, strict=True):
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                args, kwargs = (_part(call[kind], rows, len(hidden)) for kind in ("args", "kwargs"))
                found.append(Example(hidden[rows], args, kwargs, target[rows]))
        return found

    def stages(self, name: str, block: nn.Module, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """`layers` of a block in the order in which it runs them; those that share an input tensor stand together.

        Raises:
            CalibrationError: The block does not run one of them.
        """
        seen: dict[int, list[str]] = {}
        kept: list[Tensor] = []  # so that no identity is used twice

        def note(layer: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                kept.append(args[0])
                seen.setdefault(id(args[0]), []).append(layer)

            return hook

        call, count = self._calls[name][0], len(self._hidden[0])
        args, kwargs = (_part(call[kind], slice(0, 1), count) for kind in ("args", "kwargs"))
        with torch.no_grad(), _hooks({layers[layer]: note(layer) for layer in layers}):
            block(self._hidden[0][:1], *args, **kwargs)
        missing = set(layers) - {layer for stage in seen.values() for layer in stage}
        if missing:
            raise CalibrationError(f"{sorted(missing)[0]}: is not used when the model runs on text. List it under skip")
        return list(seen.values())

    def second_moment(self, name: str, block: nn.Module, layer: nn.Module) -> Tensor:
        """Mean of `x x^T` over the inputs of a layer of a block, float64 `[in, in]`."""
        moment = _Moment()
        with _hooks({layer: moment}):
            self._run(name, block, self._hidden)
        return moment.mean()


class _Moment:
    """A hook that adds up `x x^T` over all inputs of a layer: products in float32, sums in float64."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        moment = (x.T @ x).double()
        self._total, self._tokens = moment if self._total is None else self._total.add_(moment), self._tokens + len(x)

    def mean(self) -> Tensor:
        assert self._total is not None
        return self._total.div_(self._tokens)


def _part(value: Any, rows: slice, count: int) -> Any:
    """Arguments for some of a batch's `count` sequences: tensors with a batch axis are cut, all else stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and len(value) == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_part(item, rows, count) for item in value)
    if isinstance(value, dict):
        return {key: _part(item, rows, count) for key, item in value.items()}
    return value


@contextmanager
def _replaced(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for name in others}
    try:
        for name, other in others.items():
            model.set_submodule(name, other)
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
