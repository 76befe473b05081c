"""Statistics of a model's inputs, gathered block by block.

The walk keeps one set of hidden states. At each block it runs the block on them as the model would, lets the caller
quantize the block's layers stage by stage, and runs the then quantized block to get the next hidden states. So every
layer is calibrated on what it will really see: the outputs of quantized layers before it.

The model and the hidden states may lie elsewhere than the device that computes: then a block at a time is brought there
(`nn/resident.py`), and hidden states batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quadapt.calibrate.batch import Batch, inputs_of, labelled, parted
from quadapt.errors import CalibrationError
from quadapt.nn.block_ap import Example
from quadapt.nn.resident import indexed, moved, resident

Gathered = tuple[list[str], Tensor]
"""Layers that share their input, and its second moment, float64 `[in, in]`."""


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, and passes the hidden states on unchanged.

    They come back as the block gives them: some models take them from a tuple, others expect a tensor. Which it is, the
    first block of each class is run once to see.

    Args:
        block: What it stands in for.
        device: Where to run it.
        gives: Length of the tuple that blocks of a class give, None where it is a tensor; filled in here.
    """

    def __init__(self, block: nn.Module, device: torch.device, gives: dict[type, int | None]) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.inputs: list[Tensor] = []
        self._block, self._device, self._gives = (block,), device, gives  # in a tuple it is no submodule
        for name, value in vars(
            block
        ).items():  # models read some of a block's attributes (attention_type) before calling it
            if not name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
                self.__dict__.setdefault(name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(hidden_states)
        self.calls.append({"args": args, "kwargs": kwargs})
        block, cls = self._block[0], type(self._block[0])
        if cls not in self._gives:
            with torch.no_grad(), resident(block, self._device):
                output = block(hidden_states, *args, **kwargs)
            self._gives[cls] = len(output) if isinstance(output, (tuple, list)) else None
        return self.as_block(hidden_states)

    def as_block(self, hidden_states: Tensor) -> Any:
        """Hidden states in the form in which the block gives them."""
        length = self._gives[type(self._block[0])]
        return hidden_states if length is None else (hidden_states, *(None,) * (length - 1))

    def pop(self) -> tuple[dict[str, Any], Tensor]:
        """The last call, which is forgotten."""
        return self.calls.pop(), self.inputs.pop()


class BlockWalk:
    """The hidden states of some batches on their way through a model's blocks.

    Args:
        model: A causal language model in evaluation mode, on one device; hidden states are kept there too.
        blocks: The blocks of the model by name, in order (`model.select.find_blocks`).
        batches: What to calibrate on.
        device: Where to compute. Default: where the model is.

    Raises:
        CalibrationError: There are no batches, or the model does not call its blocks once each, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
    ) -> None:
        if not batches:
            raise CalibrationError("there is no calibration data")
        home = next(model.parameters()).device
        self.device = home if device is None else indexed(device)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise CalibrationError(
                f"{type(model).__name__} is an encoder-decoder, which cannot be calibrated yet. Use rounding 'nearest'"
            )
        self._gives: dict[type, int | None] = {}
        recorders = {name: _Recorder(block, self.device, self._gives) for name, block in blocks.items()}
        body: nn.Module = getattr(model, "base_model", model)  # without the head: nobody asks for logits
        ones: dict[Any, dict[str, Any]] = {}
        with torch.no_grad(), _replaced(model, recorders), resident(body, self.device):
            for batch in batches:
                if _lengths(batch) not in ones:  # of one sequence: tells which axis of an argument is the batch's
                    body(**inputs_of(parted(batch, 1)[0], self.device), use_cache=False)
                    ones[_lengths(batch)] = {
                        name: _shapes(recorder.pop()[0]) for name, recorder in recorders.items() if recorder.calls
                    }
                body(**inputs_of(batch, self.device), use_cache=False)
                seen: dict[int, Tensor] = {}  # masks and the like, which all blocks of a model share
                for recorder in recorders.values():
                    recorder.calls[-1:] = moved(recorder.calls[-1:], home, seen)
                    recorder.inputs[-1:] = moved(recorder.inputs[-1:], home, seen)
        counts = {len(recorder.calls) for recorder in recorders.values()}
        if counts != {len(batches)}:
            raise CalibrationError(
                f"{type(model).__name__} does not call each of its blocks once. It cannot be calibrated; "
                "use --rounding nearest"
            )
        self._calls = {name: recorder.calls for name, recorder in recorders.items()}
        self._ones = {name: [ones[_lengths(batch)][name] for batch in batches] for name in recorders}
        self._hidden = self._dense = next(iter(recorders.values())).inputs

    @torch.no_grad()
    def _run(self, name: str, block: nn.Module, states: list[Tensor]) -> Iterator[Tensor]:
        """Outputs of a block for some hidden states, batch by batch, on the device that computes."""
        with resident(block, self.device):
            for hidden, call in zip(states, self._calls[name], strict=True):
                yield _output(block, *moved((hidden, call), self.device))

    def _moved_past(self, name: str, block: nn.Module, states: list[Tensor]) -> list[Tensor]:
        return [output.to(states[0].device) for output in self._run(name, block, states)]

    def advance(self, name: str, block: nn.Module) -> None:
        """Move the hidden states past a block, as it now is."""
        self._hidden = self._moved_past(name, block, self._hidden)

    def advance_dense(self, name: str, block: nn.Module) -> None:
        """Move a second set of hidden states, those of the dense model, past a block that is still dense."""
        self._dense = self._moved_past(name, block, self._dense)

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
        walk = zip(self._hidden, self._calls[name], self._ones[name], self._dense, strict=True)
        for hidden, call, one, target in walk:
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                args, kwargs = (_part(call[part], one[part], rows, len(hidden)) for part in ("args", "kwargs"))
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

        call = _part(self._calls[name][0], self._ones[name][0], slice(0, 1), len(self._hidden[0]))
        one = moved((self._hidden[0][:1], call), self.device)
        hooks = _hooks({layers[layer]: note(layer) for layer in layers})
        with torch.no_grad(), resident(block, self.device), hooks:
            _output(block, *one)
        missing = set(layers) - {layer for stage in seen.values() for layer in stage}
        if missing:
            raise CalibrationError(f"{sorted(missing)[0]}: is not used when the model runs on text. List it under skip")
        return list(seen.values())

    def second_moment(self, name: str, block: nn.Module, layer: nn.Module) -> Tensor:
        """Mean of `x x^T` over the inputs of a layer of a block, float64 `[in, in]`, on the device that computes."""
        moment = _Moment()
        with _hooks({layer: moment}):
            for _ in self._run(name, block, self._hidden):
                pass
        return moment.mean()


Watch = Callable[[nn.Module], AbstractContextManager[None]]
"""Is entered with a part of a model while that part is on the device and gradients reach its parameters."""


class BackwardWalk(BlockWalk):
    """Gradients of the loss of single sequences, part by part of the model, from its end to its beginning.

    What each block receives is kept from the way forward; on the way back a block is run once more. So the device holds
    one block, with what it computes for one sequence, and not the model.

    Args:
        model: A causal language model in evaluation mode, on one device.
        blocks: The blocks of the model by name, in order (`model.select.find_blocks`).
        sequences: Batches of one sequence each, with labels if they are inputs by name.
        device: Where to compute. Default: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        sequences: Sequence[Batch],
        device: torch.device | str | None = None,
    ) -> None:
        self._model, self._blocks, self._batches = model, blocks, list(sequences)
        super().__init__(model, blocks, self._batches, device)
        self._received = dict[str, list[Tensor]]()
        for name, block in blocks.items():
            self._received[name] = self._hidden
            self.advance(name, block)

    def back(self, watch: Watch) -> None:
        """Send gradients through all parts, once: what lies behind the blocks, the blocks, what lies before them.

        Raises:
            CalibrationError: Blocks are given more than hidden states that has gradients.
        """
        gradients = self._behind(watch)
        for name, block in reversed(list(self._blocks.items())):
            with resident(block, self.device), watch(block):
                gradients = self._through(name, block, gradients)
        self._before(gradients, watch)

    def _behind(self, watch: Watch) -> list[Tensor]:
        """Gradients of what the last block gives."""
        stand_ins = {name: _Gives(block, self.device, self._gives) for name, block in self._blocks.items()}
        gradients = []
        with _replaced(self._model, stand_ins), resident(self._model, self.device), watch(self._model):
            for batch, hidden in zip(self._batches, self._hidden, strict=True):
                given = hidden.to(self.device).detach().requires_grad_()
                for stand_in in stand_ins.values():
                    stand_in.value = given
                with torch.enable_grad():
                    self._model(**labelled(batch, self.device), use_cache=False).loss.backward()
                gradients.append(_gradient(given).to(hidden.device))
        return gradients

    def _through(self, name: str, block: nn.Module, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of what a block receives, from those of what it gives."""
        found = []
        for each in zip(self._received.pop(name), self._calls[name], gradients, strict=True):
            hidden, call, gradient = moved(each, self.device)
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad():
                _output(block, hidden, call).backward(gradient)
            found.append(_gradient(hidden).to(each[0].device))
        return found

    def _before(self, gradients: list[Tensor], watch: Watch) -> None:
        """Send gradients of what the first block receives through what lies before it, if anything there has some."""
        recorders = {name: _Recorder(block, self.device, self._gives) for name, block in self._blocks.items()}
        first = next(iter(recorders.values()))
        with _replaced(self._model, recorders), resident(self._model, self.device), watch(self._model):
            if not any(parameter.requires_grad for parameter in self._model.parameters()):
                return
            for batch, gradient in zip(self._batches, gradients, strict=True):
                with torch.enable_grad():
                    self._model(**inputs_of(batch, self.device), use_cache=False)
                hidden = first.inputs[-1]
                for name, recorder in recorders.items():
                    recorder.inputs.clear()
                    _refuse_gradients(name, recorder.calls.pop())
                if hidden.requires_grad:
                    hidden.backward(gradient.to(self.device))


class _Gives(_Recorder):
    """Stands in for a block, and gives a value that is known."""

    value: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.as_block(self.value)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _refuse_gradients(name: str, call: Any) -> None:
    """Raise CalibrationError if something in a recorded call has gradients, which would be lost."""
    if isinstance(call, Tensor) and call.requires_grad:
        raise CalibrationError(
            f"{name}: is given more than hidden states that depends on layers outside the blocks, whose gradients "
            "cannot be had block by block. List these layers under skip, or gather on the CPU (--device cpu)"
        )
    for item in call.values() if isinstance(call, dict) else call if isinstance(call, (tuple, list)) else ():
        _refuse_gradients(name, item)


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


def _output(block: nn.Module, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
    """What a block gives for some hidden states, called as it was when recorded."""
    output = block(hidden, *call["args"], **call["kwargs"])
    return output if isinstance(output, Tensor) else output[0]


def _lengths(batch: Batch) -> tuple[Any, ...]:
    """What batches have in common whose sequences have the same shapes."""
    return tuple((name, each.shape[1:]) for name, each in inputs_of(batch).items())


def _shapes(value: Any) -> Any:
    """The shapes of tensors, in whatever tuples, lists and dicts they stand."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return [_shapes(item) for item in value]
    return {key: _shapes(item) for key, item in value.items()} if isinstance(value, dict) else None


def _part(value: Any, one: Any, rows: slice, count: int) -> Any:
    """Arguments for some of a batch's `count` sequences.

    Args:
        value: Arguments for all of them.
        one: `_shapes` of the arguments for a single sequence. A tensor is cut along the axis that is `count` times as
            long (a batch folded into heads, as ALiBi has it, is several rows for a sequence); all else is shared.
        rows: Which sequences.
        count: How many there are.
    """
    if isinstance(value, Tensor) and isinstance(one, torch.Size) and len(one) == value.ndim:
        for axis, (length, single) in enumerate(zip(value.shape, one, strict=True)):
            if length != single and length == count * single:
                return value[(slice(None),) * axis + (slice(rows.start * single, rows.stop * single),)]
    if isinstance(value, (tuple, list)):
        return type(value)(_part(item, each, rows, count) for item, each in zip(value, one, strict=True))
    if isinstance(value, dict):
        return {key: _part(item, one.get(key), rows, count) for key, item in value.items()}
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
