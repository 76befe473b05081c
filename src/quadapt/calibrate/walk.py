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
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quadapt.calibrate.batch import Batch, call_of, parted, real_tokens
from quadapt.calibrate.held import Held, stopping
from quadapt.errors import CalibrationError
from quadapt.nn.block_ap import Example
from quadapt.nn.experts import Experts
from quadapt.nn.resident import indexed, moved, resident, tensors_in

Gathered = tuple[list[str], Tensor | None]
"""Layers that share their input, and its second moment, float64 `[in, in]`; None if it was given too few tokens."""

LEAST_TOKENS = 32
"""How many tokens must be sent to an expert for statistics of it. With fewer, in a space of hundreds of dimensions, a
moment would tell little but where the damping is: then it is rounded to nearest, and the report names it."""

MOMENTS_AT_ONCE = 1 << 30
"""Bytes of the second moments of experts that are gathered in one pass; more of them take several passes."""


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
        self._real: Tensor | None = None  # of the batch that a block is run on
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
        return Held(lambda: model(**call), real=real_tokens(call))

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
        args, kwargs = _without_caches(moved((held.args, held.kwargs), self.device))
        return self._forwards[name](*args, **kwargs)

    @torch.no_grad()
    def _run(self, name: str, forwards: Sequence[Held]) -> Iterator[tuple[Held, Any]]:
        """What a block gives for what each forward calls it with, on the device that computes."""
        with resident(self._blocks[name], self.device):
            for held in forwards:
                self._real = moved(held.real, self.device)
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
        groups, found = self.stages(name, layers), list[Gathered]()
        routed = [group for group in groups if _place(group[0], self._experts(name))]
        *first, last = [*self._fitting(routed, layers)] or [[]]
        for some in first:
            found += self._gather(name, some, layers)
        with self._gathering(name, last + [group for group in groups if group not in routed], layers) as moments:
            self.advance(name)
        return found + moments()

    def moments(self, name: str, groups: Sequence[list[str]], layers: Mapping[str, nn.Module]) -> Iterator[Gathered]:
        """Second moments of groups of layers of a block, each group's when it is asked for.

        A group may be quantized before the next one is asked for, and is then calibrated on. What experts of one layer
        are given does not depend on each other: their moments are gathered together.

        Args:
            name: The block, at which all forwards are held.
            groups: Groups of layers that share their input, as :meth:`stages` gives them.
            layers: The layers by name.
        """
        experts = self._experts(name)
        for place, some in groupby(groups, lambda group: _place(group[0], experts)):
            for together in self._fitting(list(some), layers) if place else ([group] for group in some):
                yield from self._gather(name, together, layers)

    def _experts(self, name: str) -> dict[str, Experts]:
        """The experts in a block, by the beginning of the names of their layers."""
        inside = self._blocks[name].named_modules(prefix=name)
        return {f"{path}.": module for path, module in inside if isinstance(module, Experts)}

    def _fitting(self, groups: Sequence[list[str]], layers: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
        """Groups as many at a time as have moments that fit together."""
        some, size = list[list[str]](), 0
        for group in groups:
            linear: Any = layers[group[0]]
            more = 8 * linear.in_features**2
            if some and size + more > MOMENTS_AT_ONCE:
                yield some
                some, size = [], 0
            some.append(group)
            size += more
        if some:
            yield some

    def _gather(self, name: str, groups: Sequence[list[str]], layers: Mapping[str, nn.Module]) -> list[Gathered]:
        with self._gathering(name, groups, layers) as moments:
            for _ in self._run(name, self._held):
                pass
        return moments()

    @contextmanager
    def _gathering(
        self, name: str, groups: Sequence[list[str]], layers: Mapping[str, nn.Module]
    ) -> Iterator[Callable[[], list[Gathered]]]:
        """Inside, second moments of the inputs of some groups are added up; gives the function that tells them."""
        moments, experts = [_Moment(lambda: self._real) for _ in groups], self._experts(name)

        def told() -> list[Gathered]:
            least = [LEAST_TOKENS if _place(group[0], experts) or _of_an_expert(group[0]) else 1 for group in groups]
            return [(group, moment.mean(at)) for group, moment, at in zip(groups, moments, least, strict=True)]

        with _hooks({layers[group[0]]: moment for group, moment in zip(groups, moments, strict=True)}):
            yield told

    def examples(self) -> list[Example]:
        """What the next block is called with, and what the dense one gave (:meth:`advance_dense` has been called)."""
        calls = (_without_caches((held.args, held.kwargs)) for held in self._held)
        return [
            Example(args, kwargs, next(tensors_in(target)))
            for (args, kwargs), target in zip(calls, self._targets, strict=True)
        ]

    def stages(self, name: str, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """`layers` of a block in the order in which it runs them; those that share their inputs stand together.

        Of experts none need be run: those of one layer stand where it is run, first what all of them begin with. Those
        of models whose own code has them as modules (by their names) stand last if they are not run.

        Raises:
            CalibrationError: The block does not run one of them.
        """
        given: dict[str, list[int]] = {}  # to each layer, once or more often, by identity
        kept: list[Tensor] = []  # so that no identity is used twice
        experts = self._experts(name)
        routed = {layer: place for layer in layers if (place := _place(layer, experts))}

        def note(layer: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                kept.append(args[0])
                given.setdefault(layer, []).append(id(args[0]))

            return hook

        watched = {layer: layers[layer] for layer in layers if layer not in routed}
        watched |= {prefix: experts[prefix] for prefix, _ in routed.values()}
        with _hooks({module: note(layer) for layer, module in watched.items()}):
            for _ in self._run(name, self._held[:1]):
                pass
        resting = [layer for layer in watched if layer not in given and _of_an_expert(layer)]
        missing = sorted(watched.keys() - given.keys() - {*resting})
        if missing:
            raise CalibrationError(
                f"{missing[0].rstrip('.')}: is not used when the model runs on the calibration data. List it under skip"
            )
        found, seen = list[list[str]](), dict[tuple[int, ...], list[str]]()
        for layer, inputs in given.items():
            seen.setdefault(tuple(inputs), []).append(layer)
        for stage in seen.values():
            found += [plain] if (plain := [layer for layer in stage if layer in layers]) else []
            for prefix in (layer for layer in stage if layer in experts):
                every = [f"{prefix}{at}." for at in range(experts[prefix].count)]
                groups = [[each + part for part in parts] for parts in experts[prefix].stages() for each in every]
                found += [some for group in groups if (some := [layer for layer in group if layer in layers])]
        return found + [[layer] for layer in resting]

    def second_moment(self, name: str, layer: nn.Module) -> Tensor:
        """Mean of `x x^T` over the inputs of a layer of a block, float64 `[in, in]`, on the device that computes."""
        [(_, moment)] = self._gather(name, [[""]], {"": layer})
        assert moment is not None
        return moment


def _place(layer: str, experts: Mapping[str, Experts]) -> tuple[str, str] | None:
    """The beginning of a layer's name and its part, if it is one of an expert's."""
    found = next((prefix for prefix in experts if layer.startswith(prefix)), None)
    return None if found is None else (found, layer.rpartition(".")[2])


def _of_an_expert(layer: str) -> bool:
    """Whether a layer is an expert's, by its name: of models whose own code has experts as modules."""
    return any("expert" in part and "shared" not in part for part in layer.lower().split(".")[:-1])


def _without_caches(call: tuple[Any, Any]) -> tuple[Any, Any]:
    """Arguments without caches: a block is run several times, and would note each time what it was given."""
    leaves, form = tree_flatten(call)
    args, kwargs = tree_unflatten([None if _is_cache(each) else each for each in leaves], form)
    return args, kwargs


def _is_cache(value: Any) -> bool:
    """Whether it is one of transformers' caches, which some models make though nobody asked for one (XLM)."""
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


def _close(undo: Callable[[], None], *forwards: list[Held]) -> None:
    """End all forwards, and let blocks be what they were."""
    for held in (each for some in forwards for each in some):
        held.end()
    undo()


class _Moment:
    """A hook that adds up `x x^T` over all inputs of a layer: products in float32, sums in float64.

    Args:
        real: Says which tokens of the batch that is run are no padding; None if all are.
    """

    def __init__(self, real: Callable[[], Tensor | None]) -> None:
        self._total: Tensor | None = None
        self._tokens, self._real = 0, real

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, real = args[0], self._real()
        x = (x[real] if real is not None and x.shape[:-1] == real.shape else x.flatten(0, -2)).float()
        moment = (x.T @ x).double()
        self._total, self._tokens = moment if self._total is None else self._total.add_(moment), self._tokens + len(x)

    def mean(self, least: int) -> Tensor | None:
        """The mean over all tokens; None if there were fewer than `least`."""
        return None if self._total is None or self._tokens < least else self._total.div_(self._tokens)


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
