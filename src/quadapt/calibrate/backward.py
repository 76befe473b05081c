"""Gradients of the loss of single sequences, block by block, from the end of a model to its beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quadapt.calibrate.batch import Batch, call_of
from quadapt.calibrate.held import Held
from quadapt.calibrate.walk import BlockWalk
from quadapt.nn.resident import changed, resident, tensors_in

Watch = Callable[[nn.Module], AbstractContextManager[None]]
"""Is entered with a part of a model while that part is on the device and gradients reach its parameters."""


class BackwardWalk(BlockWalk):
    """Gradients of the loss of single sequences, part by part of the model, from its end to its beginning.

    What each block is called with is kept from the way forward; on the way back a block is run once more. So the device
    holds one block, with what it computes for one sequence, and not the model. The output head is taken for a block;
    all else that lies outside of blocks is computed where the model lies.

    Args:
        model: In evaluation mode, on one device; its forward gives a loss.
        blocks: The blocks of the model by name (`model.select.find_blocks`).
        sequences: Batches of one sequence each, with labels if they are inputs by name.
        device: Where to run blocks. Default: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        sequences: Sequence[Batch],
        device: torch.device | str | None = None,
    ) -> None:
        head = _head(model)
        self._may_rest = frozenset(head)
        super().__init__(model, {**blocks, **head}, sequences, device)
        inside = {id(parameter) for block in self._blocks.values() for parameter in block.parameters()}
        self._outside = nn.ModuleList(
            module
            for module in model.modules()
            if any(each.requires_grad and id(each) not in inside for each in module.parameters(recurse=False))
        )

    def _begun(self, model: nn.Module, batch: Batch) -> Held:
        call = call_of(model, batch, self._home, loss=True)
        return Held(lambda: model(**call).loss, grad=True)

    def back(self, watch: Watch) -> None:
        """Send gradients through all parts, once: what lies behind the blocks, the blocks, what lies before them."""
        outside = list(self._outside.parameters())
        ways = [_Way(held, outside) for held in self._held]
        for name in self.order:
            for way, (_, output) in zip(ways, self._run(name, self._held), strict=True):
                way.forth(name, output, self._home)
        for way in ways:
            way.begin()
        for name in reversed(self.order):
            with resident(self._blocks[name], self.device), watch(self._blocks[name]):
                for way in ways:
                    way.back(name, self._forwards[name], self.device)
        with resident(self._outside, self.device), watch(self._outside):
            for way in ways:
                for parameter, there in zip(outside, self._outside.parameters(), strict=True):
                    if parameter in way.outside:
                        there.backward(way.outside[parameter].to(self.device))


class _Call(NamedTuple):
    """A block as it was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Tensor]
    """What it gave, cut off from how that came about: its gradients gather here."""


class _Way:
    """The way of one sequence through the model, and back.

    Args:
        held: Its forward.
        parameters: Those outside of blocks whose gradients are wanted.
    """

    def __init__(self, held: Held, parameters: Sequence[Tensor]) -> None:
        self.outside: dict[Tensor, Tensor] = {}
        """Gradients of the parameters, of the whole sequence: the square of a sum is not the sum of squares."""
        self._held, self._parameters, self._calls = held, parameters, dict[str, _Call]()
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that blocks were given, and gradients of them

    def forth(self, name: str, output: Any, home: torch.device) -> None:
        """Let the forward go on behind a block."""
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(home)
            if tensor.is_floating_point():
                leaves.append(tensor.requires_grad_())
            return tensor

        args, kwargs, given = self._held.args, self._held.kwargs, changed(output, cut)
        self._calls[name] = _Call(args, kwargs, leaves)
        self._held.go_on(given)

    def begin(self) -> None:
        """Send the loss back to what blocks gave."""
        loss, self._held.result = self._held.result, None
        self._outward([loss], [torch.ones_like(loss)])

    def back(self, name: str, forward: Callable[..., Any], device: torch.device) -> None:
        """Send gradients of what a block gave to its parameters, to what it was given, and on to what made that."""
        call, stand_ins = self._calls.pop(name), dict[int, tuple[Tensor, Tensor]]()

        def cut(tensor: Tensor) -> Tensor:
            there = tensor.detach().to(device)
            return stand_ins.setdefault(id(tensor), (tensor, there.requires_grad_(tensor.requires_grad)))[1]

        with torch.enable_grad():
            args, kwargs = changed((call.args, call.kwargs), cut)
            outputs = [each for each in tensors_in(forward(*args, **kwargs)) if each.is_floating_point()]
        pairs = [
            (output, leaf.grad.to(device))
            for output, leaf in zip(outputs, call.leaves, strict=True)
            if leaf.grad is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        for tensor, there in stand_ins.values():
            if there.grad is not None:
                gradient, (_, before) = there.grad.to(tensor.device), self._waiting.get(id(tensor), (None, 0))
                self._waiting[id(tensor)] = (tensor, gradient + before)
        earlier = {id(each) for left in self._calls.values() for each in tensors_in((left.args, left.kwargs))}
        complete = [self._waiting.pop(key) for key in list(self._waiting) if key not in earlier]
        self._outward([tensor for tensor, _ in complete], [gradient for _, gradient in complete])

    def _outward(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """Send gradients through what the model computes between blocks."""
        if not tensors:
            return
        torch.autograd.backward(tensors, gradients, retain_graph=True)
        for parameter in self._parameters:
            if parameter.grad is not None:
                self.outside[parameter] = parameter.grad + self.outside.get(parameter, 0)
                parameter.grad = None


def _head(model: Any) -> dict[str, nn.Module]:
    """The output head of a model by its name, if it has one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Linear):
        return {}
    return {name: head for name, each in model.named_modules() if each is head}
