"""Statistics of the inputs of a model's layers, gathered block by block.

The model's own forward is run for each batch, and held at every block (`held.py`). There the walk runs the block on
what the model calls it with, lets the caller quantize the block's layers stage by stage, and gives the forward what the
then quantized block makes of it. So every layer is calibrated on what it will really see: the outputs of quantized
layers before it, in whatever way the model hands them on.

Blocks may be run on another device than the one where the model lies: then a block at a time is brought there
(`nn/resident.py`), and what it is called with batch by batch. What lies outside of blocks is run where the model is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from quadapt.calibrate.batch import Batch, call_of, parted
from quadapt.calibrate.held import Held, stopping
from quadapt.errors import CalibrationError
from quadapt.nn.block_ap import Example
from quadapt.nn.resident import indexed, moved, resident, tensors_in

Gathered = tuple[list[str], Tensor]
"""Layers that share their input, and its second moment, float64 `[in, in]`."""


class BlockWalk:
    """A model's forward over some batches, block by block.

    Args:
        model: In evaluation mode, on one device, where hidden states are kept too.
        blocks: Its blocks by name, in any order (`model.select.find_blocks`).
        batches: What to calibrate on.
        device: Where to run blocks. Default: where the model is.
        size: Run so many sequences at a time, and keep what the dense model gives for them (:meth:`advance_dense`,
            :meth:`examples`). Default: whole batches, and nothing is kept.

    Attributes:
        order: The names of the blocks in the order in which the model runs them.

    Raises:
        CalibrationError: There are no batches, or the model does not run each of its blocks once.
    """

    _may_rest: frozenset[str] = frozenset()
    """Blocks that the model need not run."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
        size: int | None = None,
    ) -> None:
        if not batches:
            raise CalibrationError("there is no calibration data")
        self._home = next(model.parameters()).device
        self.device = self._home if device is None else indexed(device)
        self._forwards: dict[str, Callable[..., Any]] = {name: block.forward for name, block in blocks.items()}
        self._blocks, self._held = dict(blocks), list[Held]()
        self._dense, self._targets = list[Held](), list[Any]()
        self.close = weakref.finalize(self, _close, stopping(blocks), self._held, self._dense)
        try:
            self.order = self._found_order(model, parted(batches[0], 1)[0])
            for batch in batches if size is None else [part for each in batches for part in parted(each, size)]:
                self._held.append(self._begun(model, batch))
                if size is not None:
                    self._dense.append(self._begun(model, batch))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the model's blocks be what they were."""
        self.close()

    def _begun(self, model: nn.Module, batch: Batch) -> Held:
        """A forward over a batch that has come to the first block."""
        call = call_of(model, batch, self._home)
        return Held(lambda: model(**call))

    def _found_order(self, model: nn.Module, batch: Batch) -> list[str]:
        """Run one sequence through the model, to see in which order it runs its blocks."""
        found, held = list[str](), self._begun(model, batch)
        self._held.append(held)  # so that it is ended if anything fails
        while held.block is not None:
            name = held.block
            found.append(name)
            [(_, output)] = self._run(name, [held])
            held.go_on(moved(output, self._home))
        self._held.clear()
        for name in self._blocks:
            if name not in found and name not in self._may_rest:
                raise CalibrationError(
                    f"{name}: {type(model).__name__} does not run this block on the calibration data. Give data that "
                    "reach it (inputs by name), list it under skip, or use --rounding nearest"
                )
            if found.count(name) > 1:
                raise CalibrationError(
                    f"{name}: {type(model).__name__} runs this block {found.count(name)} times in one forward, and "
                    "blocks that are calibrated must run once. Use --rounding nearest"
                )
        return found

    def _output(self, name: str, held: Held) -> Any:
        """What a block, which is on the device, gives for what a forward calls it with."""
        if held.block != name:
            raise CalibrationError(
                f"{name}: the model runs its blocks in another order for other inputs ({held.block} stands in its "
                "place). Use --rounding nearest"
            )
        args, kwargs = moved((held.args, held.kwargs), self.device)
        return self._forwards[name](*args, **kwargs)

    @torch.no_grad()
    def _run(self, name: str, forwards: Sequence[Held]) -> Iterator[tuple[Held, Any]]:
        """What a block gives for what each forward calls it with, on the device that computes."""
        with resident(self._blocks[name], self.device):
            for held in forwards:
                yield held, self._output(name, held)

    def advance(self, name: str) -> None:
        """Let all forwards go past a block, as it now is."""
        for held, output in self._run(name, self._held):
            self._past(name, held, moved(output, self._home))

    def _past(self, name: str, held: Held, output: Any) -> None:
        held.end() if name == self.order[-1] else held.go_on(output)  # nobody asks for logits

    def advance_dense(self, name: str) -> None:
        """Let a second set of forwards, those of the dense model, come past a block that is still dense.

        They wait behind it until the next call, so that no code of the model changes in place what it gave.
        """
        at = self.order.index(name)
        for held, output in zip(self._dense, self._targets, strict=False):
            self._past(self.order[at - 1], held, output)
        self._targets = [moved(output, self._home) for _, output in self._run(name, self._dense)]

    def advance_and_gather(self, name: str, layers: Mapping[str, nn.Module]) -> list[Gathered]:
        """Let all forwards go past a block, and gather the second moments of its layers' inputs on the way.

        Returns:
            For each group of layers that share their input: their names, and the moment as :meth:`second_moment`.
        """
        stages = self.stages(name, layers)
        moments = [_Moment() for _ in stages]
        with _hooks({layers[stage[0]]: moment for stage, moment in zip(stages, moments, strict=True)}):
            self.advance(name)
        return [(stage, moment.mean()) for stage, moment in zip(stages, moments, strict=True)]

    def examples(self) -> list[Example]:
        """What the next block is called with, and what the dense one gave (:meth:`advance_dense` has been called)."""
        return [
            Example(held.args, held.kwargs, next(tensors_in(target)))
            for held, target in zip(self._held, self._targets, strict=True)
        ]

    def stages(self, name: str, layers: Mapping[str, nn.Module]) -> list[list[str]]:
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

        with _hooks({layers[layer]: note(layer) for layer in layers}):
            for _ in self._run(name, self._held[:1]):
                pass
        missing = set(layers) - {layer for stage in seen.values() for layer in stage}
        if missing:
            raise CalibrationError(
                f"{sorted(missing)[0]}: is not used when the model runs on the calibration data. List it under skip"
            )
        return list(seen.values())

    def second_moment(self, name: str, layer: nn.Module) -> Tensor:
        """Mean of `x x^T` over the inputs of a layer of a block, float64 `[in, in]`, on the device that computes."""
        moment = _Moment()
        with _hooks({layer: moment}):
            for _ in self._run(name, self._held):
                pass
        return moment.mean()


def _close(undo: Callable[[], None], *forwards: list[Held]) -> None:
    """End all forwards, and let blocks be what they were."""
    for held in (each for some in forwards for each in some):
        held.end()
    undo()


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


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
