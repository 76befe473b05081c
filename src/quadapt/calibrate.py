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

Batch = Tensor
"""Token ids `[sequences, length]`, without padding."""


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
        self._hidden = next(iter(recorders.values())).inputs

    @torch.no_grad()
    def run(self, name: str, block: nn.Module) -> list[Tensor]:
        """Outputs of a block for the present hidden states, batch by batch."""
        outputs = []
        for hidden, call in zip(self._hidden, self._calls[name], strict=True):
            output = block(hidden, *call["args"], **call["kwargs"])
            outputs.append(output if isinstance(output, Tensor) else output[0])
        return outputs

    def advance(self, name: str, block: nn.Module) -> None:
        """Move the hidden states past a block, as it now is."""
        self._hidden = self.run(name, block)

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

        call = self._calls[name][0]
        with torch.no_grad(), _hooks({layers[layer]: note(layer) for layer in layers}):
            block(self._hidden[0][:1], *_first(call["args"]), **_first(call["kwargs"]))
        missing = set(layers) - {layer for stage in seen.values() for layer in stage}
        if missing:
            raise CalibrationError(f"{sorted(missing)[0]}: is not used when the model runs on text. List it under skip")
        return list(seen.values())

    def second_moment(self, name: str, block: nn.Module, layer: nn.Module) -> Tensor:
        """Mean of `x x^T` over the inputs of a layer of a block, float64 `[in, in]`."""
        total: Tensor | None = None
        tokens = 0

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total, tokens
            x = args[0].flatten(0, -2).float()
            moment = (x.T @ x).double()
            total, tokens = moment if total is None else total.add_(moment), tokens + len(x)

        with _hooks({layer: hook}):
            self.run(name, block)
        assert total is not None
        return total.div_(tokens)


def _first(value: Any) -> Any:
    """Arguments for the first sequence of a batch alone: tensors with a batch axis are cut, all else stays."""
    if isinstance(value, Tensor):
        return value[:1] if value.ndim > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_first(item) for item in value)
    if isinstance(value, dict):
        return {key: _first(item) for key, item in value.items()}
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
